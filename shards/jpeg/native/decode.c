/* The steps of a decode: header, view, the MCUs under the view, samples, pixels, resampling. */

#include "decode.h"

#include "region.h"
#include "resample.h"

/* Resample a rectangle of decoded pixels. */
static bool resample(struct workspace *workspace, const struct region *region, const struct filter *across,
                     const struct filter *down, uint8_t *out) {
    const struct kernels *kernels = workspace->kernels;
    int height = region->bottom - region->top;
    size_t bytes = (size_t)across->outputs * 3, stride = (bytes + ROW_PADDING + 31) & ~(size_t)31;
    /* weights of zero may reach beyond the last row */
    if (!reserve(&workspace->across, stride * (size_t)(height + down->taps))) {
        return false;
    }
    uint8_t *rows = workspace->across.bytes;
    for (int y = 0; y < height; y += 2) {
        bool is_single = y + 1 == height;
        const uint8_t *one = pixel_row(region, region->top + y, 0);
        const uint8_t *other = is_single ? one : pixel_row(region, region->top + y + 1, 1);
        uint8_t *one_out = rows + (size_t)y * stride;
        kernels->resample_across(one, other, across, one_out, is_single ? one_out : one_out + stride);
    }
    for (int i = 0; i < down->outputs; i++) {
        kernels->resample_down(rows + (size_t)down->start[i] * stride, (ptrdiff_t)stride,
                               down->weights + (size_t)i * (size_t)down->taps, down->taps, down->precision,
                               out + (size_t)i * bytes, (int)bytes);
    }
    return true;
}

/* Show `size` x `size` pixels of `whole` from (left, top) on; outside of it is black. */
static void shift(const uint8_t *whole, int size, int left, int top, uint8_t *out) {
    int from = left > 0 ? left : 0, to = left > 0 ? 0 : -left, width = size - (left > 0 ? left : -left);
    memset(out, 0, (size_t)size * (size_t)size * 3);
    for (int y = 0; y < size && width > 0; y++) {
        if (y + top >= 0 && y + top < size) {
            memcpy(out + ((size_t)y * (size_t)size + (size_t)to) * 3,
                   whole + ((size_t)(y + top) * (size_t)size + (size_t)from) * 3, (size_t)width * 3);
        }
    }
}

static void mirror(uint8_t *pixels, int size) {
    for (int y = 0; y < size; y++, pixels += (size_t)size * 3) {
        for (int left = 0, right = size - 1; left < right; left++, right--) {
            for (int c = 0; c < 3; c++) {
                uint8_t kept = pixels[3 * left + c];
                pixels[3 * left + c] = pixels[3 * right + c];
                pixels[3 * right + c] = kept;
            }
        }
    }
}

enum status decode_view(struct workspace *workspace, const uint8_t *image, size_t image_size, const uint8_t *record,
                        size_t record_size, uint32_t row, const struct transform *transform, uint64_t epoch,
                        uint64_t sample, uint8_t *out) {
    struct frame frame;
    struct view view;
    struct filter across, down;
    struct crop_index index;
    struct region region = {.workspace = workspace, .frame = &frame};
    int size = transform->size;
    int status = read_header(image, image_size, &frame);
    if (status) {
        return (enum status)status;
    }
    draw_view(transform, frame.width, frame.height, epoch, sample, &view);
    if (view.width < 1 || view.height < 1) {
        return STATUS_UNSUPPORTED; /* ratios that no rectangle of this image has */
    }
    bool is_padded = transform->crop == CROP_PADDED;
    int first_column = is_padded ? 0 : view.shift_left, first_row = is_padded ? 0 : view.shift_top;
    if (!make_filter(view.width, view.scaled_width, first_column, size, view.flip && !is_padded,
                     &workspace->filters[0], &workspace->starts[0], &across, &region.left, &region.right) ||
        !make_filter(view.height, view.scaled_height, first_row, size, false, &workspace->filters[1],
                     &workspace->starts[1], &down, &region.top, &region.bottom)) {
        return STATUS_NO_MEMORY;
    }
    region.left += view.left;
    region.right += view.left;
    region.top += view.top;
    region.bottom += view.top;

    bool is_stale = false, is_decoded = false;
    if (record && open_record(record, record_size, row, image, image_size, &frame, &index)) {
        status = decode_indexed(&region, image, image_size, &index);
        if (status == STATUS_NO_MEMORY) {
            return STATUS_NO_MEMORY;
        }
        is_decoded = status == 0;
        is_stale = !is_decoded;
    } else if (record) {
        is_stale = !is_record_without_entries(record, record_size, row, image, image_size);
    }
    if (!is_decoded) {
        status = decode_plain(&region, image, image_size);
        if (status) {
            return (enum status)status;
        }
    }
    if (!prepare_rows(&region, across.taps)) {
        return STATUS_NO_MEMORY;
    }
    uint8_t *whole = is_padded ? reserve(&workspace->whole, (size_t)size * (size_t)size * 3) : out;
    if (!whole || !resample(workspace, &region, &across, &down, whole)) {
        return STATUS_NO_MEMORY;
    }
    if (is_padded) {
        shift(whole, size, view.shift_left, view.shift_top, out);
        if (view.flip) {
            mirror(out, size);
        }
    }
    return is_decoded ? STATUS_INDEXED : is_stale ? STATUS_STALE : STATUS_PLAIN;
}
