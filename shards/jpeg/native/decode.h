/* From an encoded image to the pixels of its view. */
#ifndef ONEHOUR_DECODE_H
#define ONEHOUR_DECODE_H

#include "view.h"
#include "workspace.h"

/* Decode the view of one sample.

   workspace: of this thread.
   image, image_size: the encoded image.
   record, record_size, row: its crop index record, or NULL, and its row in the shard.
   epoch, sample: the keys of the view; without meaning in evaluation.
   out: size x size x 3 bytes.

   Returns a status; `out` is defined only where that is not negative. */
enum status decode_view(struct workspace *workspace, const uint8_t *image, size_t image_size, const uint8_t *record,
                        size_t record_size, uint32_t row, const struct transform *transform, uint64_t epoch,
                        uint64_t sample, uint8_t *out);

#endif
