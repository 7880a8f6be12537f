/* Computing resampling weights. */

#include "resample.h"

#include <math.h>

#define MOST_PRECISION 22 /* so that 255 times the sum of the weights fits into 31 bits */

/* The samples [begin, end) under output `index`, as Pillow rounds them. */
static void reach(int length, double scale, double support, int index, double *centre, int *begin, int *end) {
    *centre = (index + 0.5) * scale;
    *begin = (int)(*centre - support + 0.5);
    *end = (int)(*centre + support + 0.5);
    *begin = *begin < 0 ? 0 : *begin;
    *end = *end > length ? length : *end;
    if (*begin > length - 1) { /* only by rounding */
        *begin = length - 1;
    }
    if (*end <= *begin) {
        *end = *begin + 1;
    }
}

static double triangle(double distance) {
    distance = fabs(distance);
    return distance < 1.0 ? 1.0 - distance : 0.0;
}

bool make_filter(int length, int scaled, int first, int outputs, bool reverse, struct buffer *weights,
                 struct buffer *starts, struct filter *filter, int *low, int *high) {
    double scale = (double)length / scaled, support = scale < 1.0 ? 1.0 : scale, centre;
    int begin, end, most = 0;
    *low = length;
    *high = 0;
    for (int i = 0; i < outputs; i++) {
        reach(length, scale, support, first + i, &centre, &begin, &end);
        most = end - begin > most ? end - begin : most;
        *low = begin < *low ? begin : *low;
        *high = end > *high ? end : *high;
    }
    int taps = (most + 3) & ~3;
    size_t count = (size_t)outputs * (size_t)taps;
    if (!reserve(weights, count * (sizeof(int16_t) + sizeof(float))) ||
        !reserve(starts, (size_t)outputs * sizeof(int32_t))) {
        return false;
    }
    int16_t *whole = (int16_t *)(void *)weights->bytes;
    float *exact = (float *)(void *)(weights->bytes + count * sizeof(int16_t));
    int32_t *start = (int32_t *)(void *)starts->bytes;
    float largest = 0;
    for (int i = 0; i < outputs; i++) {
        reach(length, scale, support, first + (reverse ? outputs - 1 - i : i), &centre, &begin, &end);
        float *row = exact + (size_t)i * (size_t)taps;
        double sum = 0;
        start[i] = begin - *low;
        for (int k = 0; k < taps; k++) {
            double weight = k < end - begin ? triangle((begin + k - centre + 0.5) / support) : 0;
            row[k] = (float)weight;
            sum += weight;
        }
        if (sum <= 0) {
            row[0] = 1;
            sum = 1;
        }
        for (int k = 0; k < taps; k++) {
            row[k] = (float)(row[k] / sum);
            largest = row[k] > largest ? row[k] : largest;
        }
    }
    int precision = 14; /* the margin below is for what rounding leaves over, which the largest weight takes */
    while (precision < MOST_PRECISION && largest * (float)(2 << precision) < INT16_MAX - 256) {
        precision++;
    }
    for (int i = 0; i < outputs; i++) {
        const float *row = exact + (size_t)i * (size_t)taps;
        int16_t *out = whole + (size_t)i * (size_t)taps;
        int rest = 1 << precision, middle = 0;
        for (int k = 0; k < taps; k++) {
            out[k] = (int16_t)lrintf(row[k] * (float)(1 << precision));
            rest -= out[k];
            middle = out[k] > out[middle] ? k : middle;
        }
        out[middle] = (int16_t)(out[middle] + rest); /* a flat area stays exactly as it is */
    }
    *filter = (struct filter){
        .outputs = outputs, .taps = taps, .precision = precision, .start = start, .weights = whole};
    return true;
}
