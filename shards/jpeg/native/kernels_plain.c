/* The inner loops in portable C, for any processor. */

#include "kernels.h"

#define VARIANT(name) name##_plain
#include "entropy_loops.inc"
#include "sampling.inc"

static uint8_t clamp(int32_t value) { return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value); }

/* ---------------------------------------------------------------- inverse DCT */

/* Constants of jidctint.c, in 13 bits after the point. */
enum {
    F_0_298 = 2446,
    F_0_390 = 3196,
    F_0_541 = 4433,
    F_0_765 = 6270,
    F_0_899 = 7373,
    F_1_175 = 9633,
    F_1_501 = 12299,
    F_1_847 = 15137,
    F_1_961 = 16069,
    F_2_053 = 16819,
    F_2_562 = 20995,
    F_3_072 = 25172,
};

/* Arithmetic is that of the vector variants on any input: 16-bit operands that wrap, 32-bit sums that wrap, results
   that saturate to 16 bits. On images that an encoder made, none of this happens. */
ALWAYS_INLINE uint32_t product(int16_t value, int16_t factor) { return (uint32_t)(value * factor); }
ALWAYS_INLINE int16_t wrap(int32_t value) { return (int16_t)(uint16_t)value; }
ALWAYS_INLINE int16_t descale(uint32_t sum, int shift) {
    int32_t value = (int32_t)(sum + (1u << (shift - 1))) >> shift;
    value = value > INT16_MAX ? INT16_MAX : value;
    return (int16_t)(value < INT16_MIN ? INT16_MIN : value);
}

/* One dimension, for the eight columns side by side: a loop that compilers vectorise. */
ALWAYS_INLINE void transform_columns(const int16_t *restrict in, int16_t *restrict out, int shift) {
    for (int i = 0; i < 8; i++) {
        int16_t v0 = in[i], v1 = in[8 + i], v2 = in[16 + i], v3 = in[24 + i];
        int16_t v4 = in[32 + i], v5 = in[40 + i], v6 = in[48 + i], v7 = in[56 + i];
        uint32_t even2 = product(v2, F_0_541) + product(v6, F_0_541 - F_1_847);
        uint32_t even3 = product(v2, F_0_541 + F_0_765) + product(v6, F_0_541);
        uint32_t even0 = product(wrap(v0 + v4), 1 << 13), even1 = product(wrap(v0 - v4), 1 << 13);
        int16_t z3 = wrap(v7 + v3), z4 = wrap(v5 + v1);
        uint32_t common3 = product(z3, F_1_175 - F_1_961) + product(z4, F_1_175);
        uint32_t common4 = product(z3, F_1_175) + product(z4, F_1_175 - F_0_390);
        uint32_t odd0 = product(v7, -F_0_899) + product(v1, F_1_501 - F_0_899) + common4;
        uint32_t odd1 = product(v5, -F_2_562) + product(v3, F_3_072 - F_2_562) + common3;
        uint32_t odd2 = product(v5, F_2_053 - F_2_562) + product(v3, -F_2_562) + common4;
        uint32_t odd3 = product(v7, F_0_298 - F_0_899) + product(v1, -F_0_899) + common3;
        out[i] = descale(even0 + even3 + odd0, shift);
        out[56 + i] = descale(even0 + even3 - odd0, shift);
        out[8 + i] = descale(even1 + even2 + odd1, shift);
        out[48 + i] = descale(even1 + even2 - odd1, shift);
        out[16 + i] = descale(even1 - even2 + odd2, shift);
        out[40 + i] = descale(even1 - even2 - odd2, shift);
        out[24 + i] = descale(even0 - even3 + odd3, shift);
        out[32 + i] = descale(even0 - even3 - odd3, shift);
    }
}

static void inverse_dct_block(const int16_t *coefficients, const int16_t *steps, uint8_t *out, ptrdiff_t stride) {
    int16_t values[64], turned[64];
    for (int i = 0; i < 64; i++) {
        values[i] = wrap(coefficients[i] * steps[i]);
    }
    transform_columns(values, turned, 11);
    for (int i = 0; i < 64; i++) {
        values[i] = turned[i % 8 * 8 + i / 8];
    }
    transform_columns(values, turned, 18);
    for (int i = 0; i < 8; i++, out += stride) {
        for (int k = 0; k < 8; k++) {
            out[k] = clamp(turned[8 * k + i] + 128);
        }
    }
}

static void inverse_dct_plain(const int16_t *one, const int16_t *other, const int16_t *steps, uint8_t *one_out,
                              uint8_t *other_out, ptrdiff_t stride) {
    inverse_dct_block(one, steps, one_out, stride);
    if (other != one) {
        inverse_dct_block(other, steps, other_out, stride);
    }
}

/* ---------------------------------------------------------------- colour */

/* Sixteen pixels at a time, channel by channel: loops that compilers vectorise, and as far as the vector variants read
   and write beyond a row. Factors have 16 bits after the point; whole numbers are taken out of them so that they fit into 16 bits. */
static void colour_plain(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *rgbx, int count) {
    const int32_t half = 1 << 15;
    for (int first = 0; first < count; first += 16, rgbx += 64) {
        uint8_t channels[3][16];
        for (int i = 0; i < 16; i++) {
            int16_t light = y[first + i], blue = (int16_t)(cb[first + i] - 128), red = (int16_t)(cr[first + i] - 128);
            channels[0][i] = clamp(light + red + ((26345 * red + half) >> 16));
            channels[1][i] = clamp(light - red + ((18734 * red - 22554 * blue + half) >> 16));
            channels[2][i] = clamp(light + 2 * blue + ((-14942 * blue + half) >> 16));
        }
        for (int i = 0; i < 16; i++) {
            for (int c = 0; c < 3; c++) {
                rgbx[4 * i + c] = channels[c][i];
            }
            rgbx[4 * i + 3] = 255;
        }
    }
}

/* ---------------------------------------------------------------- resampling */

ALWAYS_INLINE void across_taps(const uint8_t *row, const struct filter *filter, int taps, uint8_t *out) {
    const int16_t *weights = filter->weights;
    const int32_t half = 1 << (filter->precision - 1);
    for (int i = 0; i < filter->outputs; i++, weights += taps, out += 3) {
        const uint8_t *pixel = row + 4 * (ptrdiff_t)filter->start[i];
        int32_t sums[4] = {half, half, half, half};
        for (int k = 0; k < taps; k++) {
            for (int c = 0; c < 4; c++) { /* X, too: four are as quick as three */
                sums[c] += weights[k] * pixel[4 * k + c];
            }
        }
        for (int c = 0; c < 3; c++) {
            out[c] = clamp(sums[c] >> filter->precision);
        }
    }
}

static void across(const uint8_t *row, const struct filter *filter, uint8_t *out) {
    if (filter->taps == 4) { /* scales up to two: most crops */
        across_taps(row, filter, 4, out);
    } else {
        across_taps(row, filter, filter->taps, out);
    }
}

static void resample_across_plain(const uint8_t *one, const uint8_t *other, const struct filter *filter,
                                  uint8_t *one_out, uint8_t *other_out) {
    across(one, filter, one_out);
    if (other_out != one_out) {
        across(other, filter, other_out);
    }
}

#define STRIP 64 /* bytes whose sums stay in registers or the first cache */

static void resample_down_plain(const uint8_t *rows, ptrdiff_t stride, const int16_t *weights, int taps, int precision,
                                uint8_t *out, int bytes) {
    for (int first = 0; first < bytes; first += STRIP) {
        int count = bytes - first < STRIP ? bytes - first : STRIP;
        int32_t sums[STRIP];
        for (int i = 0; i < STRIP; i++) {
            sums[i] = 1 << (precision - 1);
        }
        for (int k = 0; k < taps; k++) {
            if (!weights[k]) {
                continue; /* which may lie beyond the last row */
            }
            const uint8_t *row = rows + k * stride + first;
            for (int i = 0; i < STRIP; i++) { /* rows are padded by as much */
                sums[i] += weights[k] * row[i];
            }
        }
        for (int i = 0; i < count; i++) {
            out[first + i] = clamp(sums[i] >> precision);
        }
    }
}

const struct kernels kernels_plain = {
    .name = "portable C",
    .decode_run = decode_run_plain,
    .skip_run = skip_run_plain,
    .decode_runs = decode_runs_plain,
    .inverse_dct = inverse_dct_plain,
    .double_width = double_width_plain,
    .double_both = double_both_plain,
    .double_height = double_height_plain,
    .colour = colour_plain,
    .resample_across = resample_across_plain,
    .resample_down = resample_down_plain,
};
