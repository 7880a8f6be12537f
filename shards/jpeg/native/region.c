/* Decoding the MCUs under a rectangle of pixels. */

#include "region.h"

#include "walk.h"

#define RUNS_AT_ONCE 24 /* enough to keep three streams busy, few enough for their coefficients to stay in the cache */
#define PLANE_PADDING 64 /* bytes before and after each row of samples */

static int expansion(const struct frame *frame, int component, bool across) {
    const struct component *part = &frame->component[component];
    return across ? frame->h_max / part->h : frame->v_max / part->v;
}

/* Which MCUs are needed, and room for their samples. Upsampling by two looks one sample of chroma further. */
static bool place_planes(struct region *region) {
    const struct frame *frame = region->frame;
    int beyond_across = 0, beyond_down = 0;
    for (int c = 0; c < frame->components; c++) {
        beyond_across = expansion(frame, c, true) == 2 ? 2 : beyond_across;
        beyond_down = expansion(frame, c, false) == 2 ? 2 : beyond_down;
    }
    int left = region->left - beyond_across, top = region->top - beyond_down;
    region->first_column = (left < 0 ? 0 : left) / frame->mcu_width;
    region->first_row = (top < 0 ? 0 : top) / frame->mcu_height;
    region->last_column = (region->right + beyond_across + frame->mcu_width - 1) / frame->mcu_width;
    region->last_row = (region->bottom + beyond_down + frame->mcu_height - 1) / frame->mcu_height;
    region->last_column = region->last_column > frame->mcus_across ? frame->mcus_across : region->last_column;
    region->last_row = region->last_row > frame->mcus_down ? frame->mcus_down : region->last_row;
    for (int c = 0; c < frame->components; c++) {
        const struct component *component = &frame->component[c];
        struct plane *plane = &region->plane[c];
        size_t width = (size_t)(region->last_column - region->first_column) * (size_t)component->h * 8;
        size_t height = (size_t)(region->last_row - region->first_row) * (size_t)component->v * 8;
        size_t stride = width + 2 * PLANE_PADDING;
        if (!reserve(&region->workspace->planes[c], stride * height)) {
            return false;
        }
        plane->samples = region->workspace->planes[c].bytes + PLANE_PADDING;
        plane->stride = (ptrdiff_t)stride;
        plane->first_column = region->first_column * component->h * 8;
        plane->first_row = region->first_row * component->v * 8;
    }
    return true;
}

/* All samples of a block that has a DC coefficient alone. */
static void fill_block(int16_t coefficient, int16_t step, uint8_t *out, ptrdiff_t stride) {
    int value = (((int16_t)(uint16_t)(coefficient * step) + 4) >> 3) + 128;
    uint64_t samples = 0x0101010101010101u * (uint64_t)(value < 0 ? 0 : value > 255 ? 255 : value);
    for (int i = 0; i < 8; i++, out += stride) {
        memcpy(out, &samples, sizeof samples);
    }
}

/* Inverse DCT of the region's part of one row of MCUs, whose coefficients begin with MCU `column`. */
static void transform_row(const struct region *region, int row, int column, const int16_t *coefficients,
                          const uint8_t *lengths) {
    const struct frame *frame = region->frame;
    const struct kernels *kernels = region->workspace->kernels;
    int blocks = frame->blocks_per_mcu, block_in_mcu = 0;
    for (int c = 0; c < frame->components; c++) {
        const struct component *component = &frame->component[c];
        const struct plane *plane = &region->plane[c];
        const int16_t *steps = frame->quantization[component->quantization];
        const int16_t *waiting = NULL; /* for a second block: the kernel takes two */
        uint8_t *waiting_out = NULL;
        for (int by = 0; by < component->v; by++) {
            uint8_t *out = plane->samples +
                           ((row - region->first_row) * component->v * 8 + by * 8) * plane->stride;
            for (int mcu = region->first_column; mcu < region->last_column; mcu++) {
                size_t number = (size_t)(mcu - column) * (size_t)blocks +
                                (size_t)(block_in_mcu + by * component->h);
                for (int bx = 0; bx < component->h; bx++, number++, out += 8) {
                    const int16_t *block = coefficients + number * BLOCK_SIZE;
                    if (lengths[number] == 1) {
                        fill_block(block[0], steps[0], out, plane->stride);
                    } else if (waiting) {
                        kernels->inverse_dct(waiting, block, steps, waiting_out, out, plane->stride);
                        waiting = NULL;
                    } else {
                        waiting = block;
                        waiting_out = out;
                    }
                }
            }
        }
        if (waiting) {
            kernels->inverse_dct(waiting, waiting, steps, waiting_out, waiting_out, plane->stride);
        }
        block_in_mcu += component->h * component->v;
    }
}

/* Repeat the first and last sample of every row beyond the image's edges, for upsampling. */
static void extend_edges(struct region *region) {
    const struct frame *frame = region->frame;
    for (int c = 0; c < frame->components; c++) {
        const struct component *component = &frame->component[c];
        if (expansion(frame, c, true) != 2) {
            continue;
        }
        struct plane *plane = &region->plane[c];
        int rows = (region->last_row - region->first_row) * component->v * 8;
        int end = component->width - plane->first_column;
        bool at_left = region->first_column == 0, at_right = region->last_column == frame->mcus_across;
        for (int y = 0; y < rows; y++) {
            uint8_t *samples = plane->samples + y * plane->stride;
            if (at_left) {
                samples[-1] = samples[0];
            }
            if (at_right) {
                samples[end] = samples[end - 1];
            }
        }
    }
}

int decode_plain(struct region *region, const uint8_t *image, size_t image_size) {
    const struct frame *frame = region->frame;
    struct walk walk;
    if (!place_planes(region)) {
        return STATUS_NO_MEMORY;
    }
    int width = region->last_column - region->first_column;
    int status = begin_walk(&walk, region->workspace, image, image_size, frame, width);
    for (int row = 0; row < region->last_row && !status; row++) {
        bool is_needed = row >= region->first_row;
        int before = is_needed ? region->first_column : frame->mcus_across;
        if (!skip_mcus(&walk, before) || (is_needed && !walk_mcus(&walk, width))) {
            status = STATUS_DAMAGED;
            break;
        }
        if (is_needed) {
            transform_row(region, row, region->first_column,
                          (const int16_t *)(const void *)region->workspace->coefficients.bytes,
                          region->workspace->lengths.bytes);
            status = skip_mcus(&walk, frame->mcus_across - region->last_column) ? 0 : STATUS_DAMAGED;
        }
    }
    if (!status) {
        extend_edges(region);
    }
    return status;
}

/* Where the runs of a group of MCU rows are put. */
struct group {
    struct run *runs;
    int count;
    uint8_t *bytes;
    int16_t *coefficients;
    uint8_t *lengths;
};

/* Add the runs between two entries: one, or one for each restart marker that lies between them. */
static bool add_runs(struct group *group, const struct frame *frame, const struct crop_index *index, size_t number,
                     int first_mcu, int mcus, const uint8_t *image, size_t image_size) {
    struct entry entry, next;
    read_entry(index, number, &entry);
    read_entry(index, number + 1, &next);
    if (next.byte + (next.bit ? 1 : 0) > image_size || entry.byte > next.byte) {
        return false;
    }
    const uint8_t *end = image + next.byte + (next.bit ? 1 : 0), *image_end = image + image_size;
    const uint8_t *from = image + entry.byte;
    const int interval = frame->restart_interval, total = frame->mcus_across * frame->mcus_down;
    while (mcus) {
        int due = interval ? interval - first_mcu % interval : mcus, chunk = due < mcus ? due : mcus;
        int last_mcu = first_mcu + chunk;
        struct run *run = &group->runs[group->count++];
        const uint8_t *stop;
        *run = (struct run){.bytes = group->bytes,
                            .bit = entry.bit,
                            .mcus = chunk,
                            .coefficients = group->coefficients,
                            .lengths = group->lengths};
        memcpy(run->dc, entry.dc, sizeof run->dc);
        run->size = unstuff(from, end, image_end, group->bytes, &stop);
        if (interval && last_mcu % interval == 0 && last_mcu != total) {
            unsigned restart = (unsigned)(last_mcu / interval - 1) & 7;
            if (image_end - stop < 2 || stop[0] != 0xFF || stop[1] != 0xD0 + restart) {
                return false;
            }
            run->ends_padded = true;
            from = stop + 2;
            memset(&entry, 0, sizeof entry);
            if (chunk == mcus && from != image + next.byte) {
                return false;
            }
        } else {
            if (stop < end) {
                return false;
            }
            run->end_bits = next.bit;
            memcpy(run->end_dc, next.dc, sizeof run->end_dc);
        }
        group->bytes += run->size + RUN_PADDING;
        group->coefficients += (size_t)chunk * (size_t)frame->blocks_per_mcu * BLOCK_SIZE;
        group->lengths += (size_t)chunk * (size_t)frame->blocks_per_mcu;
        first_mcu = last_mcu;
        mcus -= chunk;
        if (mcus && from > end) {
            return false;
        }
    }
    return true;
}

int decode_indexed(struct region *region, const uint8_t *image, size_t image_size, const struct crop_index *index) {
    const struct frame *frame = region->frame;
    struct workspace *workspace = region->workspace;
    struct scan scan;
    if (!place_planes(region)) {
        return STATUS_NO_MEMORY;
    }
    int status = prepare_scan(workspace, frame, &scan);
    if (status) {
        return status;
    }
    int first_run = region->first_column / index->mcus_per_run;
    int last_run = (region->last_column + index->mcus_per_run - 1) / index->mcus_per_run;
    int first_mcu = first_run * index->mcus_per_run, last_mcu = last_run * index->mcus_per_run;
    last_mcu = last_mcu > frame->mcus_across ? frame->mcus_across : last_mcu;
    int across = last_run - first_run, mcus = last_mcu - first_mcu;
    int rows_at_once = (RUNS_AT_ONCE + across - 1) / across;
    int most_runs = across * 2 + (frame->restart_interval ? mcus / frame->restart_interval : 0);
    size_t blocks = (size_t)mcus * (size_t)frame->blocks_per_mcu;
    for (int row = region->first_row; row < region->last_row; row += rows_at_once) {
        int rows = region->last_row - row < rows_at_once ? region->last_row - row : rows_at_once;
        size_t bytes = 0;
        for (int i = 0; i < rows; i++) {
            size_t number = (size_t)(row + i) * (size_t)index->runs_across + (size_t)first_run;
            struct entry entry, next;
            read_entry(index, number, &entry);
            bytes -= entry.byte;
            for (int run = first_run; run < last_run; run++, entry = next) { /* each run must end behind its start */
                read_entry(index, ++number, &next);
                if (next.byte > image_size || entry.byte > next.byte) {
                    return STATUS_STALE;
                }
            }
            bytes += entry.byte + (size_t)most_runs * (RUN_PADDING + 2);
        }
        if (!reserve(&workspace->bytes, bytes) ||
            !reserve(&workspace->runs, (size_t)(rows * most_runs) * sizeof(struct run)) ||
            !reserve(&workspace->coefficients, (size_t)rows * blocks * BLOCK_SIZE * sizeof(int16_t)) ||
            !reserve(&workspace->lengths, (size_t)rows * blocks)) {
            return STATUS_NO_MEMORY;
        }
        struct group group = {.runs = (struct run *)(void *)workspace->runs.bytes,
                              .bytes = workspace->bytes.bytes,
                              .coefficients = (int16_t *)(void *)workspace->coefficients.bytes,
                              .lengths = workspace->lengths.bytes};
        const int16_t *coefficients = group.coefficients;
        const uint8_t *lengths = group.lengths;
        const struct run *runs = group.runs;
        for (int i = 0; i < rows; i++) {
            for (int run = first_run; run < last_run; run++) {
                int begin = run * index->mcus_per_run, end = begin + index->mcus_per_run;
                end = end > frame->mcus_across ? frame->mcus_across : end;
                if (!add_runs(&group, frame, index, (size_t)(row + i) * (size_t)index->runs_across + (size_t)run,
                              (row + i) * frame->mcus_across + begin, end - begin, image, image_size)) {
                    return STATUS_STALE;
                }
            }
        }
        if (!workspace->kernels->decode_runs(runs, group.count, &scan)) {
            return STATUS_STALE;
        }
        for (int i = 0; i < rows; i++) {
            transform_row(region, row + i, first_mcu, coefficients + (size_t)i * blocks * BLOCK_SIZE,
                          lengths + (size_t)i * blocks);
        }
    }
    extend_edges(region);
    return 0;
}
