/* The inner loops for x86-64 processors with AVX2 and BMI2, chosen at run time. */

#include "kernels.h"

#if HAVE_AVX2_KERNELS

#include <immintrin.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2")
#endif

#define VARIANT(name) name##_avx2
#include "entropy_loops.inc"
#include "sampling.inc"

/* ---------------------------------------------------------------- inverse DCT

   Each half of a register belongs to one of the two blocks. Constants and steps are those of kernels_plain.c. */

static __m256i pair(int a, int b) { return _mm256_set1_epi32((int)((uint32_t)(uint16_t)a | (uint32_t)b << 16)); }

/* a * x + b * y in 32 bits, for the lower and upper four lanes of each half. */
#define ROTATE(low, high, x, y, factors)                                                                               \
    __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), factors);                                             \
    __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), factors)

#define DESCALE(value, shift) _mm256_srai_epi32(_mm256_add_epi32(value, _mm256_set1_epi32(1 << ((shift) - 1))), shift)

/* Eight values in each lane, in place. */
#define TRANSFORM(in, shift)                                                                                           \
    do {                                                                                                               \
        const __m256i zero = _mm256_setzero_si256();                                                                   \
        ROTATE(even2l, even2h, in[2], in[6], pair(4433, 4433 - 15137));                                                \
        ROTATE(even3l, even3h, in[2], in[6], pair(4433 + 6270, 4433));                                                 \
        __m256i total = _mm256_add_epi16(in[0], in[4]), gap = _mm256_sub_epi16(in[0], in[4]);                          \
        __m256i even0l = _mm256_srai_epi32(_mm256_unpacklo_epi16(zero, total), 3);                                     \
        __m256i even0h = _mm256_srai_epi32(_mm256_unpackhi_epi16(zero, total), 3);                                     \
        __m256i even1l = _mm256_srai_epi32(_mm256_unpacklo_epi16(zero, gap), 3);                                       \
        __m256i even1h = _mm256_srai_epi32(_mm256_unpackhi_epi16(zero, gap), 3);                                       \
        __m256i z3 = _mm256_add_epi16(in[7], in[3]), z4 = _mm256_add_epi16(in[5], in[1]);                              \
        ROTATE(common3l, common3h, z3, z4, pair(9633 - 16069, 9633));                                                  \
        ROTATE(common4l, common4h, z3, z4, pair(9633, 9633 - 3196));                                                   \
        ROTATE(odd0l, odd0h, in[7], in[1], pair(-7373, 12299 - 7373));                                                 \
        ROTATE(odd1l, odd1h, in[5], in[3], pair(-20995, 25172 - 20995));                                               \
        ROTATE(odd2l, odd2h, in[5], in[3], pair(16819 - 20995, -20995));                                               \
        ROTATE(odd3l, odd3h, in[7], in[1], pair(2446 - 7373, -7373));                                                  \
        OUTPUT(in[0], in[7], ADD(even0l, even3l), ADD(even0h, even3h), ADD(odd0l, common4l), ADD(odd0h, common4h),     \
               shift);                                                                                                 \
        OUTPUT(in[1], in[6], ADD(even1l, even2l), ADD(even1h, even2h), ADD(odd1l, common3l), ADD(odd1h, common3h),     \
               shift);                                                                                                 \
        OUTPUT(in[2], in[5], SUBTRACT(even1l, even2l), SUBTRACT(even1h, even2h), ADD(odd2l, common4l),                 \
               ADD(odd2h, common4h), shift);                                                                           \
        OUTPUT(in[3], in[4], SUBTRACT(even0l, even3l), SUBTRACT(even0h, even3h), ADD(odd3l, common3l),                 \
               ADD(odd3h, common3h), shift);                                                                           \
    } while (0)
#define ADD(a, b) _mm256_add_epi32(a, b)
#define SUBTRACT(a, b) _mm256_sub_epi32(a, b)
#define OUTPUT(first, last, evenl, evenh, oddl, oddh, shift)                                                           \
    do {                                                                                                               \
        __m256i el = evenl, eh = evenh, ol = oddl, oh = oddh;                                                          \
        first = _mm256_packs_epi32(DESCALE(ADD(el, ol), shift), DESCALE(ADD(eh, oh), shift));                          \
        last = _mm256_packs_epi32(DESCALE(SUBTRACT(el, ol), shift), DESCALE(SUBTRACT(eh, oh), shift));                 \
    } while (0)

/* Rows become columns, within each half. */
ALWAYS_INLINE void transpose(__m256i *r) {
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        r[2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 4]);
        r[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 4]);
    }
}

static void inverse_dct_avx2(const int16_t *one, const int16_t *other, const int16_t *steps, uint8_t *one_out,
                             uint8_t *other_out, ptrdiff_t stride) {
    __m256i rows[8];
    for (int i = 0; i < 8; i++) {
        __m256i both = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(one + 8 * i))),
            _mm_loadu_si128((const __m128i *)(other + 8 * i)), 1);
        __m256i step = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(steps + 8 * i)));
        rows[i] = _mm256_mullo_epi16(both, step);
    }
    TRANSFORM(rows, 11);
    transpose(rows);
    TRANSFORM(rows, 18);
    transpose(rows);
    const __m256i middle = _mm256_set1_epi8((char)128);
    for (int i = 0; i < 8; i += 2) {
        /* rows i and i + 1 of both blocks */
        __m256i bytes = _mm256_xor_si256(_mm256_packs_epi16(rows[i], rows[i + 1]), middle);
        __m128i first = _mm256_castsi256_si128(bytes), second = _mm256_extracti128_si256(bytes, 1);
        _mm_storel_epi64((__m128i *)(one_out + i * stride), first);
        _mm_storel_epi64((__m128i *)(one_out + (i + 1) * stride), _mm_unpackhi_epi64(first, first));
        _mm_storel_epi64((__m128i *)(other_out + i * stride), second);
        _mm_storel_epi64((__m128i *)(other_out + (i + 1) * stride), _mm_unpackhi_epi64(second, second));
    }
}

/* ---------------------------------------------------------------- colour

   The factors of kernels_plain.c less a whole number, so that they fit into 16 bits:
   91881 = 65536 + 26345, 116130 = 131072 - 14942, 46802 = 65536 - 18734. */

ALWAYS_INLINE __m256i sixteen(const uint8_t *bytes) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)bytes));
}

/* (factor * value + 2¹⁵) >> 16 */
ALWAYS_INLINE __m256i scaled(__m256i value, int factor) {
    __m256i doubled = _mm256_mulhi_epi16(_mm256_add_epi16(value, value), _mm256_set1_epi16((short)factor));
    return _mm256_srai_epi16(_mm256_add_epi16(doubled, _mm256_set1_epi16(1)), 1);
}

static void colour_avx2(const uint8_t *y, const uint8_t *cb, const uint8_t *cr, uint8_t *rgbx, int count) {
    const __m256i middle = _mm256_set1_epi16(128), half = _mm256_set1_epi32(1 << 15), opaque = _mm256_set1_epi16(255);
    const __m256i green = pair(-22554, 18734);
    for (int i = 0; i < count; i += 16, rgbx += 64) {
        __m256i light = sixteen(y + i);
        __m256i blue = _mm256_sub_epi16(sixteen(cb + i), middle), red = _mm256_sub_epi16(sixteen(cr + i), middle);
        __m256i r = _mm256_add_epi16(_mm256_add_epi16(light, red), scaled(red, 26345));
        __m256i b = _mm256_add_epi16(_mm256_add_epi16(light, _mm256_add_epi16(blue, blue)), scaled(blue, -14942));
        __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(blue, red), green);
        __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(blue, red), green);
        low = _mm256_srai_epi32(_mm256_add_epi32(low, half), 16);
        high = _mm256_srai_epi32(_mm256_add_epi32(high, half), 16);
        __m256i g = _mm256_add_epi16(_mm256_sub_epi16(light, red), _mm256_packs_epi32(low, high));
        __m256i rb = _mm256_packus_epi16(r, b), gx = _mm256_packus_epi16(g, opaque);
        __m256i rg = _mm256_unpacklo_epi8(rb, gx), bx = _mm256_unpackhi_epi8(rb, gx);
        __m256i first = _mm256_unpacklo_epi16(rg, bx), second = _mm256_unpackhi_epi16(rg, bx);
        _mm256_storeu_si256((__m256i *)rgbx, _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256((__m256i *)(rgbx + 32), _mm256_permute2x128_si256(first, second, 0x31));
    }
}

/* ---------------------------------------------------------------- resampling */

/* Two weights in every 32 bits. */
ALWAYS_INLINE __m256i two_weights(const int16_t *weights) {
    int32_t both;
    memcpy(&both, weights, sizeof both);
    return _mm256_set1_epi32(both);
}

/* One output of two rows, each in one half of a register, as R, G, B, X in 32 bits. `taps` is a constant where this is
   inlined. */
ALWAYS_INLINE __m256i across_both(const uint8_t *one, const uint8_t *other, const int16_t *weights, int taps,
                                  __m256i half, __m128i precision) {
    /* four pixels of R, G, B, X become pairs of 16 bits: the first two pixels, and the others */
    const __m256i front = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1, 0, -1, 4, -1, 1, -1,
                                           5, -1, 2, -1, 6, -1, 3, -1, 7, -1);
    const __m256i back = _mm256_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1, 8, -1, 12, -1,
                                          9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
    __m256i sum = half;
    for (int k = 0; k < taps; k += 4) {
        __m256i pixels = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(one + 4 * k))),
            _mm_loadu_si128((const __m128i *)(other + 4 * k)), 1);
        __m256i first = _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, front), two_weights(weights + k));
        __m256i second = _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, back), two_weights(weights + k + 2));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(first, second));
    }
    return _mm256_sra_epi32(sum, precision);
}

ALWAYS_INLINE void across(const uint8_t *one, const uint8_t *other, const struct filter *filter, int taps,
                          uint8_t *one_out, uint8_t *other_out) {
    const __m128i precision = _mm_cvtsi32_si128(filter->precision);
    const __m256i half = _mm256_set1_epi32(1 << (filter->precision - 1));
    /* R, G, B, X of two pixels become R, G, B, R, G, B */
    const __m256i tight = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 2, 4, 5, 6,
                                           -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const int16_t *weights = filter->weights;
    for (int i = 0; i < filter->outputs; i += 2, weights += 2 * taps) {
        int next = i + 1 < filter->outputs; /* of an odd number, the last is done twice */
        ptrdiff_t first = 4 * (ptrdiff_t)filter->start[i], second = 4 * (ptrdiff_t)filter->start[i + next];
        __m256i sums = _mm256_packs_epi32(
            across_both(one + first, other + first, weights, taps, half, precision),
            across_both(one + second, other + second, weights + next * taps, taps, half, precision));
        __m256i pixels = _mm256_shuffle_epi8(_mm256_packus_epi16(sums, sums), tight);
        /* two bytes too many, which the next pixel overwrites */
        _mm_storel_epi64((__m128i *)(one_out + 3 * i), _mm256_castsi256_si128(pixels));
        _mm_storel_epi64((__m128i *)(other_out + 3 * i), _mm256_extracti128_si256(pixels, 1));
    }
}

static void resample_across_avx2(const uint8_t *one, const uint8_t *other, const struct filter *filter,
                                 uint8_t *one_out, uint8_t *other_out) {
    if (filter->taps == 4) { /* scales up to two: most crops */
        across(one, other, filter, 4, one_out, other_out);
    } else {
        across(one, other, filter, filter->taps, one_out, other_out);
    }
}

ALWAYS_INLINE void down_sixteen(const uint8_t *rows, ptrdiff_t stride, const int16_t *weights, int taps,
                                __m128i precision, __m256i half, uint8_t *out) {
    __m256i low = half, high = half;
    for (int k = 0; k < taps; k += 2) {
        __m256i one = sixteen(rows + k * stride), other = sixteen(rows + (k + 1) * stride);
        __m256i both = two_weights(weights + k);
        low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(one, other), both));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(one, other), both));
    }
    low = _mm256_sra_epi32(low, precision);
    high = _mm256_sra_epi32(high, precision);
    __m256i words = _mm256_packs_epi32(low, high);
    __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0x08);
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(bytes));
}

static void resample_down_avx2(const uint8_t *rows, ptrdiff_t stride, const int16_t *weights, int taps, int precision,
                               uint8_t *out, int bytes) {
    if (bytes < 16) {
        kernels_plain.resample_down(rows, stride, weights, taps, precision, out, bytes);
        return;
    }
    const __m128i shift = _mm_cvtsi32_si128(precision);
    const __m256i half = _mm256_set1_epi32(1 << (precision - 1));
    while (taps > 2 && !weights[taps - 1] && !weights[taps - 2]) {
        taps -= 2;
    }
    int i = 0;
    for (; i + 16 <= bytes; i += 16) {
        down_sixteen(rows + i, stride, weights, taps, shift, half, out + i);
    }
    if (i < bytes) { /* once more over some of the last, so that nothing beyond the row is written */
        i = bytes - 16;
        down_sixteen(rows + i, stride, weights, taps, shift, half, out + i);
    }
}

const struct kernels kernels_avx2 = {
    .name = "AVX2",
    .decode_run = decode_run_avx2,
    .skip_run = skip_run_avx2,
    .decode_runs = decode_runs_avx2,
    .inverse_dct = inverse_dct_avx2,
    .double_width = double_width_avx2,
    .double_both = double_both_avx2,
    .double_height = double_height_avx2,
    .colour = colour_avx2,
    .resample_across = resample_across_avx2,
    .resample_down = resample_down_avx2,
};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
