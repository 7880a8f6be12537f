/* Which part of an image is shown: pipeline/augment.py in C, drawing the same numbers from the same key. It is here
   because the crop depends on the image's size, which is known only once its header has been read. */
#ifndef ONEHOUR_VIEW_H
#define ONEHOUR_VIEW_H

#include <stdbool.h>
#include <stdint.h>

enum crop { CROP_RESIZED, CROP_PADDED, CROP_NONE, CROP_EVALUATION };

/* How images become `size` x `size` pixels. */
struct transform {
    int size;
    enum crop crop;
    uint64_t key[2];             /* of Philox, the low word first */
    double scale[2], ratio[2], log_ratio[2];
    int padding;
    bool flip;
    int evaluation_resize;       /* the short side before the centre crop */
};

/* A rectangle of the image is scaled to `scaled_width` x `scaled_height`; of that, the `size` x `size` pixels from
   (shift_left, shift_top) on are shown, black where they lie outside. */
struct view {
    int left, top, width, height;
    int scaled_width, scaled_height;
    int shift_left, shift_top;
    bool flip;
};

void draw_view(const struct transform *transform, int width, int height, uint64_t epoch, uint64_t sample,
               struct view *view);

#endif
