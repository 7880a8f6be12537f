/* What every part of the decoder shares: the outcome of a decode, the limits, and the header of a baseline JPEG.

   Layout and names of the markers: ITU-T T.81 (JPEG), annexes B and F. Where the standard leaves a choice, pixels are
   those of libjpeg-turbo, bit for bit; whatever is not a plain baseline JPEG is refused, so that another decoder can
   decide about it. */
#ifndef ONEHOUR_JPEG_H
#define ONEHOUR_JPEG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define LIKELY(condition) __builtin_expect(!!(condition), 1)
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#else
#error "the decoder needs GCC or clang"
#endif

/* The same numbers as shards.jpeg.Status. */
enum status {
    STATUS_INDEXED = 0,      /* decoded, starting from the crop index */
    STATUS_PLAIN = 1,        /* decoded from the top: there is no index */
    STATUS_STALE = 2,        /* decoded from the top: the index is damaged, or not of this image */
    STATUS_UNSUPPORTED = -1, /* not a baseline JPEG of one or three components */
    STATUS_DAMAGED = -2,
    STATUS_TOO_LARGE = -3,
    STATUS_UNREADABLE = -4,  /* the file could not be read, or is shorter than it should be */
    STATUS_NO_MEMORY = -5,
    STATUS_STOPPED = -6,     /* not tried: the caller does not want the rest any more */
};

#define MAX_PIXELS 89478485u /* from here on Pillow warns of a decompression bomb: it shall have its say */
#define MAX_COMPONENTS 3
#define MAX_BLOCKS_PER_MCU 10 /* T.81, B.2.3 */
#define BLOCK_SIZE 64         /* coefficients, or samples, in a block of 8 x 8 */

/* A Huffman table as the file has it: 16 counts of codes by length, then the symbols. */
struct huffman_spec {
    const uint8_t *bytes; /* inside the file; NULL where no DHT marker defined the table */
    int symbols;
};

struct component {
    int h, v;         /* sampling factors: blocks per MCU, across and down */
    int quantization; /* number of its table */
    int dc, ac;       /* numbers of its Huffman tables */
    int width, height; /* in samples, without the padding to whole blocks (libjpeg's downsampled_width, …_height) */
};

/* All that is known of an image before its entropy-coded data. */
struct frame {
    int width, height; /* pixels */
    int components;
    struct component component[MAX_COMPONENTS];
    int h_max, v_max;
    int mcu_width, mcu_height; /* pixels */
    int mcus_across, mcus_down;
    int blocks_per_mcu;
    int restart_interval;        /* in MCUs; 0 without restart markers */
    int16_t quantization[4][64]; /* in natural order */
    bool quantization_defined[4];
    struct huffman_spec dc[4], ac[4];
    size_t scan_offset; /* of the first entropy-coded byte */
};

/* Zigzag position -> natural position, row by row. */
extern const uint8_t natural_order[64];

/* Read the markers up to the entropy-coded data. Returns 0, or the reason for which another decoder is needed. */
int read_header(const uint8_t *data, size_t size, struct frame *frame);

#endif
