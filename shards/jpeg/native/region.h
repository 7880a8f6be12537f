/* A rectangle of an image's pixels: decoding the MCUs that it needs, and giving out its rows. */
#ifndef ONEHOUR_REGION_H
#define ONEHOUR_REGION_H

#include "crop_index.h"
#include "workspace.h"

/* The samples of one component under the region. */
struct plane {
    uint8_t *samples; /* of the first row and column below */
    ptrdiff_t stride;
    int first_column, first_row; /* of the component */
};

struct region {
    struct workspace *workspace;
    const struct frame *frame;
    int left, top, right, bottom; /* pixels */

    /* filled in by decoding */
    int first_column, last_column, first_row, last_row; /* MCUs, the last ones not included */
    struct plane plane[MAX_COMPONENTS];

    /* filled in by prepare_rows */
    uint8_t *rgbx[2];
    uint8_t *upsampled[MAX_COMPONENTS];
    int16_t *scratch;
};

/* Decode the samples, starting from the crop index, or from the top of the file. Return 0 or a refusal. */
int decode_indexed(struct region *region, const uint8_t *image, size_t image_size, const struct crop_index *index);
int decode_plain(struct region *region, const uint8_t *image, size_t image_size);

/* Make room for rows of pixels, of which `taps` more than there are may be read. */
bool prepare_rows(struct region *region, int taps);

/* Row `y` of the image as R, G, B, X, from the region's left to its right. It lasts until the next call with the same
   `slot`, 0 or 1. */
const uint8_t *pixel_row(const struct region *region, int y, int slot);

#endif
