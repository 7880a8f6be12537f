/* The inner loops, in one variant per kind of processor; all variants give the same bytes. */
#ifndef ONEHOUR_KERNELS_H
#define ONEHOUR_KERNELS_H

#include "entropy.h"

/* How one axis is resampled: output i is the sum of weights[i * taps + k] * source[start[i] + k] over k. */
struct filter {
    int outputs;
    int taps;               /* a multiple of 4; trailing ones are zero */
    int precision;          /* the weights of an output sum to 1 << precision */
    const int32_t *start;   /* [outputs] */
    const int16_t *weights; /* [outputs][taps] */
};

#define ROW_PADDING 64 /* bytes that kernels may read or write beyond a row's end */

struct kernels {
    const char *name;
    bool (*decode_run)(struct stream *stream, const struct run *run, const struct scan *scan);
    bool (*skip_run)(struct stream *stream, const struct run *run, const struct scan *scan);
    bool (*decode_runs)(const struct run *runs, int count, const struct scan *scan);

    /* Inverse DCT of two blocks (libjpeg's "islow", jidctint.c): coefficients times steps, to 8 x 8 samples each. */
    void (*inverse_dct)(const int16_t *one, const int16_t *other, const int16_t *steps, uint8_t *one_out,
                        uint8_t *other_out, ptrdiff_t stride);

    /* Chroma at half width to full width (libjpeg's "fancy" triangle filter, jdsample.c): 2 * count samples. The
       samples before the first and after the last are read as well. */
    void (*double_width)(const uint8_t *row, uint8_t *out, int count);
    /* The same at half width and half height: `near` is the row that is three times as close. */
    void (*double_both)(const uint8_t *near, const uint8_t *far, uint8_t *out, int count, int16_t *scratch);
    /* At half height alone; `bias` is 1 for the upper of two rows, 2 for the lower. */
    void (*double_height)(const uint8_t *near, const uint8_t *far, uint8_t *out, int count, int bias);

    /* A row of pixels as R, G, B, 255 (libjpeg's jdcolor.c). */
    void (*colour)(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *rgbx, int count);

    /* Two rows of R, G, B, X across, to rows of R, G, B. */
    void (*resample_across)(const uint8_t *one, const uint8_t *other, const struct filter *filter, uint8_t *one_out,
                            uint8_t *other_out);
    /* One output row down: the sum of rows; `bytes` of each. Writes nothing beyond `bytes`. */
    void (*resample_down)(const uint8_t *rows, ptrdiff_t stride, const int16_t *weights, int taps, int precision,
                          uint8_t *out, int bytes);
};

extern const struct kernels kernels_plain;
#if defined(__x86_64__)
#define HAVE_AVX2_KERNELS 1
extern const struct kernels kernels_avx2;
#endif

#endif
