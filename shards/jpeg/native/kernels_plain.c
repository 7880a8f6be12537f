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
static int32_t product(int16_t value, int32_t factor) { return value * factor; }
static int16_t sum16(int16_t a, int16_t b) { return (int16_t)(uint16_t)(a + b); }
static int32_t sum32(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
static int32_t difference32(int32_t a, int32_t b) { return (int32_t)((uint32_t)a - (uint32_t)b); }
static int16_t descale(int32_t value, int shift) {
    value = sum32(value, 1 << (shift - 1)) >> shift;
    return (int16_t)(value > INT16_MAX ? INT16_MAX : value < INT16_MIN ? INT16_MIN : value);
}

/* Eight values at a distance of `step`, in place. */
static void transform(int16_t *values, int step, int shift) {
    int16_t in[8];
    for (int i = 0; i < 8; i++) {
        in[i] = values[i * step];
    }
    int32_t even2 = sum32(product(in[2], F_0_541), product(in[6], F_0_541 - F_1_847));
    int32_t even3 = sum32(product(in[2], F_0_541 + F_0_765), product(in[6], F_0_541));
    int32_t even0 = product(sum16(in[0], in[4]), 1 << 13);
    int32_t even1 = product((int16_t)(uint16_t)(in[0] - in[4]), 1 << 13);
    int32_t even[4] = {sum32(even0, even3), sum32(even1, even2), difference32(even1, even2),
                       difference32(even0, even3)};
    int16_t z3 = sum16(in[7], in[3]), z4 = sum16(in[5], in[1]);
    int32_t common3 = sum32(product(z3, F_1_175 - F_1_961), product(z4, F_1_175));
    int32_t common4 = sum32(product(z3, F_1_175), product(z4, F_1_175 - F_0_390));
    int32_t odd[4] = {
        sum32(sum32(product(in[7], -F_0_899), product(in[1], F_1_501 - F_0_899)), common4),
        sum32(sum32(product(in[5], -F_2_562), product(in[3], F_3_072 - F_2_562)), common3),
        sum32(sum32(product(in[5], F_2_053 - F_2_562), product(in[3], -F_2_562)), common4),
        sum32(sum32(product(in[7], F_0_298 - F_0_899), product(in[1], -F_0_899)), common3),
    };
    for (int i = 0; i < 4; i++) {
        values[i * step] = descale(sum32(even[i], odd[i]), shift);
        values[(7 - i) * step] = descale(difference32(even[i], odd[i]), shift);
    }
}

static void inverse_dct_block(const int16_t *coefficients, const int16_t *steps, uint8_t *out, ptrdiff_t stride) {
    int16_t values[64];
    for (int i = 0; i < 64; i++) {
        values[i] = (int16_t)(uint16_t)(coefficients[i] * steps[i]);
    }
    for (int i = 0; i < 8; i++) {
        transform(values + i, 8, 11);
    }
    for (int i = 0; i < 8; i++, out += stride) {
        transform(values + 8 * i, 1, 18);
        for (int k = 0; k < 8; k++) {
            out[k] = clamp(values[8 * i + k] + 128);
        }
    }
}

static void inverse_dct_plain(const int16_t *one, const int16_t *other, const int16_t *steps, uint8_t *one_out,
                              uint8_t *other_out, ptrdiff_t stride) {
    inverse_dct_block(one, steps, one_out, stride);
    inverse_dct_block(other, steps, other_out, stride);
}

/* ---------------------------------------------------------------- colour */

static void colour_plain(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *rgbx, int count) {
    for (int i = 0; i < count; i++, rgbx += 4) {
        int32_t blue = cb[i] - 128, red = cr[i] - 128, half = 1 << 15; /* factors in 16 bits after the point */
        rgbx[0] = clamp(y[i] + ((91881 * red + half) >> 16));
        rgbx[1] = clamp(y[i] + ((-22554 * blue - 46802 * red + half) >> 16));
        rgbx[2] = clamp(y[i] + ((116130 * blue + half) >> 16));
        rgbx[3] = 255;
    }
}

/* ---------------------------------------------------------------- resampling */

static void across(const uint8_t *row, const struct filter *filter, uint8_t *out) {
    const int16_t *weights = filter->weights;
    for (int i = 0; i < filter->outputs; i++, weights += filter->taps, out += 3) {
        const uint8_t *pixel = row + 4 * (ptrdiff_t)filter->start[i];
        int32_t sums[3] = {0, 0, 0};
        for (int k = 0; k < filter->taps; k++, pixel += 4) {
            for (int c = 0; c < 3; c++) {
                sums[c] += weights[k] * pixel[c];
            }
        }
        for (int c = 0; c < 3; c++) {
            out[c] = clamp((sums[c] + (1 << (filter->precision - 1))) >> filter->precision);
        }
    }
}

static void resample_across_plain(const uint8_t *one, const uint8_t *other, const struct filter *filter,
                                  uint8_t *one_out, uint8_t *other_out) {
    across(one, filter, one_out);
    if (other_out != one_out) {
        across(other, filter, other_out);
    }
}

static void resample_down_plain(const uint8_t *rows, ptrdiff_t stride, const int16_t *weights, int taps, int precision,
                                uint8_t *out, int bytes) {
    for (int i = 0; i < bytes; i++) {
        int32_t sum = 1 << (precision - 1);
        for (int k = 0; k < taps; k++) {
            sum += weights[k] * rows[k * stride + i];
        }
        out[i] = clamp(sum >> precision);
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
