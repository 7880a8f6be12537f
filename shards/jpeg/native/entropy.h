/* The entropy-coded data: runs of MCUs that can be decoded on their own, one after the other or three at a time.

   A symbol's length is known only once it is decoded, so one stream leaves most of a processor idle; three, each in a
   run of its own, are twice as fast. Runs need to be known beforehand, which is what the crop index is for.

   Reads are bounded by construction: a run's bytes are a copy without stuffing, followed by RUN_PADDING zeros. A block
   uses up at most 64 codes of 31 bits, and before each block the position is compared with the end of the run. */
#ifndef ONEHOUR_ENTROPY_H
#define ONEHOUR_ENTROPY_H

#include "huffman.h"

#define RUN_PADDING 320 /* bytes: a block of 64 codes of 31 bits, and what a refill reads beyond it */

/* The blocks of an MCU in the order of the scan, and their tables. */
struct scan {
    int blocks;
    struct {
        const struct huffman_dc *dc;
        const struct huffman_ac *ac;
        int component;
    } block[MAX_BLOCKS_PER_MCU];
};

/* MCUs without a restart marker between them. */
struct run {
    const uint8_t *bytes; /* without stuffing, RUN_PADDING zeros behind them */
    size_t size;          /* bytes that belong to the run */
    unsigned bit;         /* of the first byte, where the run begins */
    int32_t dc[MAX_COMPONENTS];
    int mcus;
    int16_t *coefficients; /* [mcus][blocks][64] in natural order */
    uint8_t *lengths;      /* [mcus][blocks]: coefficients up to the last that is not zero, in zigzag order */
    bool ends_padded;      /* at a marker: up to 7 bits are left over, and the next DC predictors are zero */
    unsigned end_bits;     /* bits of the last byte that belong to the run, 0 for all; unless it ends padded */
    int32_t end_dc[MAX_COMPONENTS];
};

/* Where decoding stands within a run. */
struct stream {
    uint64_t bits;  /* not yet used up, the next one at the top */
    unsigned count; /* of them */
    const uint8_t *next;
    const uint8_t *limit; /* the end of the run's bytes */
    const struct huffman_ac *ac;
    int16_t *block;
    uint8_t *length;
    unsigned position; /* in the block, in zigzag order */
    int index;         /* of the block in its MCU */
    int mcus;          /* still to decode, this one included */
    int32_t dc[MAX_COMPONENTS];
};

enum progress { RUNNING, FINISHED, DAMAGED };

/* Bits of the run that have been used up. */
static inline size_t bits_used(const struct stream *stream, const uint8_t *start) {
    return (size_t)(stream->next - start) * 8 - stream->count;
}

/* Whether less than a byte is left over, as before a marker. */
static inline bool is_used_up(const struct stream *stream, const struct run *run) {
    size_t used = bits_used(stream, run->bytes), size = run->size * 8;
    return used <= size && used + 8 > size;
}

/* Whether a stream stands where its run should end. */
static inline bool ends_well(const struct stream *stream, const struct run *run) {
    if (run->ends_padded) {
        return is_used_up(stream, run);
    }
    size_t whole = run->end_bits ? run->size - 1 : run->size;
    if (bits_used(stream, run->bytes) != whole * 8 + run->end_bits) {
        return false;
    }
    for (int c = 0; c < MAX_COMPONENTS; c++) {
        if (stream->dc[c] != run->end_dc[c]) {
            return false;
        }
    }
    return true;
}

/* Copy entropy-coded bytes without their stuffing, up to `end` or a marker, and pad them. `to` must have room for
   end - from + RUN_PADDING bytes.
   Returns the number of bytes before the padding; *stop is `end` (one more where it falls between 0xFF and its
   stuffing), or where a marker or the file's end cuts it short. */
size_t unstuff(const uint8_t *from, const uint8_t *end, const uint8_t *file_end, uint8_t *to, const uint8_t **stop);

#endif
