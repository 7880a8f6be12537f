/* Reading, checking and building the records of a crop index. */

#include "crop_index.h"

#include "checksum.h"
#include "walk.h"
#include "workspace.h"

#include <string.h>

static unsigned read16(const uint8_t *bytes) { return (unsigned)(bytes[0] | bytes[1] << 8); }

static void write32(uint8_t *bytes, uint32_t value) {
    for (int i = 0; i < 4; i++) {
        bytes[i] = (uint8_t)(value >> 8 * i);
    }
}

static void write64(uint8_t *bytes, uint64_t value) {
    write32(bytes, (uint32_t)value);
    write32(bytes + 4, (uint32_t)(value >> 32));
}

static int mcus_per_run(const struct frame *frame) {
    int mcus = (ENTRY_SPACING + frame->mcu_width / 2) / frame->mcu_width;
    return mcus < 1 ? 1 : mcus;
}

static bool is_of(const uint8_t *record, size_t record_size, uint32_t row, const uint8_t *image, size_t image_size) {
    return record_size >= RECORD_HEADER && read32(record) == crc32_of(record + 4, record_size - 4) &&
           read32(record + 4) == row && read32(record + 8) == image_size &&
           read32(record + 12) == (uint32_t)xxh64_of(image, image_size);
}

bool is_record_without_entries(const uint8_t *record, size_t record_size, uint32_t row, const uint8_t *image,
                               size_t image_size) {
    return is_of(record, record_size, row, image, image_size) && record[20] == KIND_NONE;
}

bool open_record(const uint8_t *record, size_t record_size, uint32_t row, const uint8_t *image, size_t image_size,
                 const struct frame *frame, struct crop_index *index) {
    if (!is_of(record, record_size, row, image, image_size) || record[20] != KIND_BASELINE ||
        record[21] != frame->components || read16(record + 16) != (unsigned)frame->width ||
        read16(record + 18) != (unsigned)frame->height || read32(record + 24) != frame->scan_offset) {
        return false;
    }
    index->mcus_per_run = (int)read16(record + 22);
    if (index->mcus_per_run < 1) {
        return false;
    }
    index->runs_across = (frame->mcus_across + index->mcus_per_run - 1) / index->mcus_per_run;
    uint64_t entries = (uint64_t)index->runs_across * (uint64_t)frame->mcus_down + 1;
    if (read32(record + 28) != entries || record_size != RECORD_HEADER + ENTRY_BYTES * entries) {
        return false;
    }
    index->entries = record + RECORD_HEADER;
    index->scan_offset = frame->scan_offset;
    return true;
}

/* An entry is 28 bits of position from the scan's start, counted in bits of the file, and 12 bits of each predictor. */
void read_entry(const struct crop_index *index, size_t number, struct entry *entry) {
    uint64_t packed = read64(index->entries + ENTRY_BYTES * number);
    size_t position = packed & ((1u << 28) - 1);
    entry->byte = index->scan_offset + position / 8;
    entry->bit = position % 8;
    for (int c = 0; c < MAX_COMPONENTS; c++) {
        uint32_t bits = (uint32_t)(packed >> (28 + 12 * c)) & 0xFFF;
        entry->dc[c] = (int32_t)(bits ^ 0x800) - 0x800;
    }
}

static bool write_entry(uint8_t *to, size_t scan_offset, const struct entry *entry) {
    size_t position = (entry->byte - scan_offset) * 8 + entry->bit;
    if (position >> 28) {
        return false;
    }
    uint64_t packed = position;
    for (int c = 0; c < MAX_COMPONENTS; c++) {
        if (entry->dc[c] < -2048 || entry->dc[c] > 2047) {
            return false;
        }
        packed |= (uint64_t)((uint32_t)entry->dc[c] & 0xFFF) << (28 + 12 * c);
    }
    write64(to, packed);
    return true;
}

/* Decode the whole scan and note the state before each run. Returns 0, or the reason why the image is not indexed. */
static int write_entries(struct workspace *workspace, const uint8_t *image, size_t image_size,
                          const struct frame *frame, uint8_t *entries) {
    struct walk walk;
    struct entry entry;
    int run = mcus_per_run(frame);
    int status = begin_walk(&walk, workspace, image, image_size, frame, 0);
    if (status) {
        return status;
    }
    for (int row = 0; row < frame->mcus_down; row++) {
        for (int column = 0; column < frame->mcus_across; column += run) {
            int mcus = frame->mcus_across - column < run ? frame->mcus_across - column : run;
            walk_entry(&walk, &entry);
            if (!write_entry(entries, frame->scan_offset, &entry) || !skip_mcus(&walk, mcus)) {
                return STATUS_DAMAGED;
            }
            entries += ENTRY_BYTES;
        }
    }
    walk_entry(&walk, &entry);
    return write_entry(entries, frame->scan_offset, &entry) ? 0 : STATUS_UNSUPPORTED;
}

const uint8_t *build_record(struct workspace *workspace, const uint8_t *image, size_t image_size, uint32_t row,
                            size_t *record_size) {
    struct frame frame;
    int status = read_header(image, image_size, &frame);
    size_t entries = 0;
    if (!status) {
        int run = mcus_per_run(&frame);
        entries = (size_t)((frame.mcus_across + run - 1) / run) * (size_t)frame.mcus_down + 1;
    }
    uint8_t *record = reserve(&workspace->record, RECORD_HEADER + ENTRY_BYTES * entries);
    if (!record) {
        return NULL;
    }
    if (!status) {
        status = write_entries(workspace, image, image_size, &frame, record + RECORD_HEADER);
        if (status == STATUS_NO_MEMORY) {
            return NULL; /* which says nothing about the image */
        }
        entries = status ? 0 : entries;
    }
    *record_size = RECORD_HEADER + ENTRY_BYTES * entries;
    memset(record, 0, RECORD_HEADER);
    write32(record + 4, row);
    write32(record + 8, (uint32_t)image_size);
    write32(record + 12, (uint32_t)xxh64_of(image, image_size));
    if (entries) {
        write32(record + 16, (uint32_t)frame.width | (uint32_t)frame.height << 16);
        write32(record + 20, KIND_BASELINE | (uint32_t)frame.components << 8 | (uint32_t)mcus_per_run(&frame) << 16);
        write32(record + 24, (uint32_t)frame.scan_offset);
        write32(record + 28, (uint32_t)entries);
    }
    write32(record, crc32_of(record + 4, *record_size - 4));
    return record;
}
