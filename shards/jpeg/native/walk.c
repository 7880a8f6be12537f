/* Decoding a scan from its top. */

#include "walk.h"

#include "workspace.h"

int prepare_scan(struct workspace *workspace, const struct frame *frame, struct scan *scan) {
    scan->blocks = 0;
    for (int c = 0; c < frame->components; c++) {
        const struct component *component = &frame->component[c];
        if (!build_dc(&workspace->dc[component->dc], &frame->dc[component->dc]) ||
            !build_ac(&workspace->ac[component->ac], &frame->ac[component->ac])) {
            return STATUS_UNSUPPORTED;
        }
        for (int i = 0; i < component->h * component->v; i++, scan->blocks++) {
            scan->block[scan->blocks].dc = &workspace->dc[component->dc];
            scan->block[scan->blocks].ac = &workspace->ac[component->ac];
            scan->block[scan->blocks].component = c;
        }
    }
    return 0;
}

/* Take the data up to the next marker. */
static bool open_segment(struct walk *walk, const uint8_t *from) {
    walk->segment = walk->from = from;
    walk->from_size = 0;
    walk->run.bytes = walk->workspace->bytes.bytes;
    walk->run.size = unstuff(from, walk->image_end, walk->image_end, walk->workspace->bytes.bytes, &walk->stop);
    walk->is_open = false;
    /* data that no marker ends are cut off: whoever reads more of the file than we do would notice */
    return walk->stop < walk->image_end - 1;
}

int begin_walk(struct walk *walk, struct workspace *workspace, const uint8_t *image, size_t image_size,
               const struct frame *frame, int most) {
    *walk = (struct walk){.workspace = workspace, .frame = frame, .image = image, .image_end = image + image_size};
    int status = prepare_scan(workspace, frame, &walk->scan);
    if (status) {
        return status;
    }
    for (int c = 0; c < frame->components; c++) {
        build_skip(&workspace->ac[frame->component[c].ac]);
    }
    size_t blocks = (size_t)(most > 0 ? most : 1) * (size_t)frame->blocks_per_mcu;
    if (!reserve(&workspace->bytes, image_size + RUN_PADDING) ||
        !reserve(&workspace->coefficients, blocks * BLOCK_SIZE * sizeof(int16_t)) ||
        !reserve(&workspace->lengths, blocks)) {
        return STATUS_NO_MEMORY;
    }
    return open_segment(walk, image + frame->scan_offset) ? 0 : STATUS_DAMAGED;
}

/* Pass the restart marker that is due, whose number must be the right one. */
static bool pass_restart(struct walk *walk) {
    unsigned number = (unsigned)(walk->mcus / walk->frame->restart_interval - 1) & 7;
    return is_used_up(&walk->stream, &walk->run) && walk->stop[1] == 0xD0 + number &&
           open_segment(walk, walk->stop + 2);
}

static bool pass_mcus(struct walk *walk, int mcus, bool keep) {
    const struct kernels *kernels = walk->workspace->kernels;
    int16_t *coefficients = (int16_t *)(void *)walk->workspace->coefficients.bytes;
    uint8_t *lengths = walk->workspace->lengths.bytes;
    const int interval = walk->frame->restart_interval;
    const int total = walk->frame->mcus_across * walk->frame->mcus_down;
    while (mcus) {
        int chunk = mcus;
        if (interval && interval - walk->mcus % interval < chunk) {
            chunk = interval - walk->mcus % interval;
        }
        walk->run.coefficients = walk->stream.block = coefficients;
        walk->run.lengths = walk->stream.length = lengths;
        walk->run.mcus = walk->stream.mcus = chunk;
        const struct run *run = walk->is_open ? NULL : &walk->run;
        if (!(keep ? kernels->decode_run : kernels->skip_run)(&walk->stream, run, &walk->scan)) {
            return false;
        }
        walk->is_open = true;
        walk->mcus += chunk;
        mcus -= chunk;
        size_t blocks = keep ? (size_t)chunk * (size_t)walk->scan.blocks : 0;
        coefficients += blocks * BLOCK_SIZE;
        lengths += blocks;
        if (bits_used(&walk->stream, walk->run.bytes) > walk->run.size * 8) {
            return false;
        }
        if (walk->mcus == total) {
            return is_used_up(&walk->stream, &walk->run);
        }
        if (interval && walk->mcus % interval == 0 && !pass_restart(walk)) {
            return false;
        }
    }
    return true;
}

bool walk_mcus(struct walk *walk, int mcus) { return pass_mcus(walk, mcus, true); }

bool skip_mcus(struct walk *walk, int mcus) { return pass_mcus(walk, mcus, false); }

void walk_entry(struct walk *walk, struct entry *entry) {
    *entry = (struct entry){.byte = (size_t)(walk->segment - walk->image)};
    if (!walk->is_open) {
        return;
    }
    size_t used = bits_used(&walk->stream, walk->run.bytes);
    while (walk->from_size < used / 8) {
        size_t bytes = used / 8 - walk->from_size;
        const uint8_t *stuffed = memchr(walk->from, 0xFF, bytes);
        size_t passed = stuffed ? (size_t)(stuffed - walk->from) + 1 : bytes;
        walk->from += stuffed ? passed + 1 : passed;
        walk->from_size += passed;
    }
    entry->byte = (size_t)(walk->from - walk->image);
    entry->bit = used % 8;
    for (int c = 0; c < MAX_COMPONENTS; c++) {
        entry->dc[c] = walk->stream.dc[c];
    }
}
