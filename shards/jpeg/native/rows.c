/* Rows of pixels out of planes of samples: upsampling of chroma, and colour. */

#include "region.h"

/* libjpeg filters what is doubled, unless a row has too few samples for that; everything else it repeats. */
enum upsampling { NONE, WIDTH, HEIGHT, BOTH, REPEAT };

static enum upsampling upsampling_of(const struct frame *frame, int component) {
    const struct component *part = &frame->component[component];
    int across = frame->h_max / part->h, down = frame->v_max / part->v;
    if (across == 1 && down == 1) {
        return NONE;
    }
    if (across == 1 && down == 2) {
        return HEIGHT;
    }
    if (across == 2 && down <= 2 && part->width > 2) {
        return down == 1 ? WIDTH : BOTH;
    }
    return REPEAT;
}

bool prepare_rows(struct region *region, int taps) {
    size_t width = (size_t)(region->right - region->left);
    size_t pixels = (4 * (width + (size_t)taps) + 2 * ROW_PADDING + 63) & ~(size_t)63;
    size_t samples = (width + 16 + 2 * ROW_PADDING + 63) & ~(size_t)63; /* a sample may begin 3 pixels before … */
    size_t sums = (2 * (width / 2 + 8) + ROW_PADDING + 63) & ~(size_t)63; /* … and one more is summed on each side */
    uint8_t *bytes = reserve(&region->workspace->rows, 2 * pixels + MAX_COMPONENTS * samples + sums);
    if (!bytes) {
        return false;
    }
    region->rgbx[0] = bytes;
    region->rgbx[1] = bytes + pixels;
    for (int c = 0; c < MAX_COMPONENTS; c++) {
        region->upsampled[c] = bytes + 2 * pixels + (size_t)c * samples;
    }
    region->scratch = (int16_t *)(void *)(bytes + 2 * pixels + MAX_COMPONENTS * samples);
    if (region->frame->components == 1) { /* gray is colour without chroma */
        memset(region->upsampled[1], 128, samples);
        memset(region->upsampled[2], 128, samples);
    }
    return true;
}

/* Row `row` of a component, counted from the image's top and held inside of it, at sample `column`. */
static const uint8_t *sample_row(const struct region *region, int component, int row, int column) {
    const struct plane *plane = &region->plane[component];
    int last = region->frame->component[component].height - 1;
    row = row < 0 ? 0 : row > last ? last : row;
    return plane->samples + (row - plane->first_row) * plane->stride + (column - plane->first_column);
}

/* The samples of a component for the pixels of row `y` from the region's left on. */
static const uint8_t *full_row(const struct region *region, int component, int y) {
    const struct frame *frame = region->frame;
    const struct kernels *kernels = region->workspace->kernels;
    const struct component *part = &frame->component[component];
    int across = frame->h_max / part->h, down = frame->v_max / part->v;
    int first = region->left / across, count = (region->right - 1) / across - first + 1;
    const uint8_t *row = sample_row(region, component, y / down, first);
    int beside = y / down + (y % down ? 1 : -1); /* the nearer of the rows above and below */
    uint8_t *out = region->upsampled[component];
    switch (upsampling_of(frame, component)) {
    case NONE:
        return row;
    case WIDTH:
        kernels->double_width(row, out, count);
        break;
    case HEIGHT:
        kernels->double_height(row, sample_row(region, component, beside, first), out, count, y % 2 ? 2 : 1);
        break;
    case BOTH:
        kernels->double_both(row, sample_row(region, component, beside, first), out, count, region->scratch);
        break;
    case REPEAT:
        for (int i = 0; i < count; i++) {
            memset(out + i * across, row[i], (size_t)across);
        }
        break;
    }
    return out + (region->left - first * across);
}

const uint8_t *pixel_row(const struct region *region, int y, int slot) {
    const uint8_t *light = full_row(region, 0, y);
    const uint8_t *chroma[2];
    for (int c = 1; c < 3; c++) {
        chroma[c - 1] = region->frame->components == 1 ? region->upsampled[c] : full_row(region, c, y);
    }
    region->workspace->kernels->colour(light, chroma[0], chroma[1], region->rgbx[slot], region->right - region->left);
    return region->rgbx[slot];
}
