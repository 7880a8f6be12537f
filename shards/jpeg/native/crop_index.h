/* The record of an image in a crop index: where decoding can start, and with which state. docs/crop_index.md has the
   layout of the whole file. */
#ifndef ONEHOUR_CROP_INDEX_H
#define ONEHOUR_CROP_INDEX_H

#include "entropy.h"

#define RECORD_HEADER 32       /* bytes before the entries */
#define ENTRY_BYTES 8
#define ENTRY_SPACING 48       /* pixels between entries, as far as MCUs allow */

#define KIND_NONE 0 /* not a baseline JPEG, or damaged: decoding starts at the top, or is left to others */
#define KIND_BASELINE 1

/* The state of the decoder between two MCUs. */
struct entry {
    size_t byte;  /* of the file */
    unsigned bit; /* of that byte, 0 at the top */
    int32_t dc[MAX_COMPONENTS];
};

/* A record that has been checked against its image. */
struct crop_index {
    const uint8_t *entries;
    size_t scan_offset;
    int mcus_per_run;
    int runs_across; /* runs of a row of MCUs */
};

/* Check a record: its checksum, that it belongs to this row of the shard and to an image of these very bytes, and that
   its entries are as many as the image calls for. False: it must not be used. `frame` is the image's header. */
bool open_record(const uint8_t *record, size_t record_size, uint32_t row, const uint8_t *image, size_t image_size,
                 const struct frame *frame, struct crop_index *index);

/* Whether a record says that its image has no entries; false also for a record that must not be used. */
bool is_record_without_entries(const uint8_t *record, size_t record_size, uint32_t row, const uint8_t *image,
                               size_t image_size);

/* The state before run `number`; the state at the end of the scan for the number of runs. */
void read_entry(const struct crop_index *index, size_t number, struct entry *entry);

struct workspace;

/* The record of an image, in memory of the workspace: its address and size; NULL if there is no memory. */
const uint8_t *build_record(struct workspace *workspace, const uint8_t *image, size_t image_size, uint32_t row,
                            size_t *record_size);

#endif
