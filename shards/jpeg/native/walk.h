/* Decoding a scan from its top, MCU by MCU, across restart markers: what is done without a crop index, and to build
   one. */
#ifndef ONEHOUR_WALK_H
#define ONEHOUR_WALK_H

#include "crop_index.h"

struct workspace;

struct walk {
    struct workspace *workspace;
    const struct frame *frame;
    struct scan scan;
    const uint8_t *image, *image_end;
    const uint8_t *segment;  /* where the data since the last restart marker begins in the file … */
    const uint8_t *stop;     /* … and the marker after it */
    struct run run;          /* the same data without its stuffing */
    struct stream stream;
    bool is_open;            /* whether `stream` stands inside the run */
    int mcus;                /* decoded so far */
    const uint8_t *from;     /* the file position that `from_size` bytes of the run correspond to */
    size_t from_size;
};

/* The tables of a scan. Returns 0 or the reason for a refusal. */
int prepare_scan(struct workspace *workspace, const struct frame *frame, struct scan *scan);

/* Start at the first MCU, with room to decode `most` MCUs at once. Returns 0 or the reason for a refusal. */
int begin_walk(struct walk *walk, struct workspace *workspace, const uint8_t *image, size_t image_size,
               const struct frame *frame, int most);

/* Decode the next MCUs into the workspace's coefficients, from the beginning of that buffer. False: damaged. */
bool walk_mcus(struct walk *walk, int mcus);

/* Pass the next MCUs, of which no coefficient is needed: in two thirds of the time. False: damaged. */
bool skip_mcus(struct walk *walk, int mcus);

/* The state between the last MCU and the next. */
void walk_entry(struct walk *walk, struct entry *entry);

#endif
