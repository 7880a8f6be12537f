/* The weights of Pillow's antialiased bilinear filter (libImaging/Resample.c), for part of an axis. */
#ifndef ONEHOUR_RESAMPLE_H
#define ONEHOUR_RESAMPLE_H

#include "buffer.h"
#include "kernels.h"

/* Scale `length` samples to `scaled`, and of those make outputs first … first + outputs - 1, the last one first if
   `reverse`. *low and *high are the range of samples that enter; the filter's starts count from *low.
   False if there is no memory. */
bool make_filter(int length, int scaled, int first, int outputs, bool reverse, struct buffer *weights,
                 struct buffer *starts, struct filter *filter, int *low, int *high);

#endif
