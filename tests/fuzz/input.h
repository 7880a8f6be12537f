/* How an input of the fuzzer is laid out: CONTROL bytes, the image, the tail. */
#ifndef ONEHOUR_FUZZ_INPUT_H
#define ONEHOUR_FUZZ_INPUT_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Places in the control bytes. make_corpus.py writes the same. */
enum {
    CONTROL_MODE = 0,
    CONTROL_SIZE = 1,
    CONTROL_CROP = 2, /* bits 0-1 enum crop, bit 2 flip */
    CONTROL_KEY = 3,
    CONTROL_RESIZE = 4,
    CONTROL_PADDING = 5,
    CONTROL_SCALE = 6,
    CONTROL_ROW = 7,
    CONTROL_RECTANGLE = 8, /* left, top, width, height in 256ths */
    CONTROL_FLAGS = 12,    /* enum flags */
    CONTROL_STARVE = 13,   /* the reservation at which memory runs out */
    CONTROL_TAIL = 14, /* size of the tail, two bytes, the high one first */
    CONTROL = 16
};

/* What is done besides decoding once with and once without a record: each takes time, and none is needed every time. */
enum flags {
    FLAG_LARGE = 1,      /* large images and outputs, too */
    FLAG_STARVE = 2,     /* memory runs out */
    FLAG_KERNELS = 4,    /* the other kernels must agree */
    FLAG_AGAIN = 8,      /* decoding again must agree */
    FLAG_OTHER_ROW = 16, /* the record must not be used for another row */
    FLAG_RECTANGLE = 32, /* a rectangle of pixels as they are, and the weights of resampling */
    FLAG_PLAIN = 64      /* begin with the portable kernels */
};

/* What is done about a record. */
enum mode {
    MODE_PLAIN,   /* there is none */
    MODE_OWN,     /* the image's own */
    MODE_DAMAGED, /* the image's own, changed as the tail says, with a checksum that is right */
    MODE_FORGED,  /* a header that fits, and entries from the tail */
    MODE_CHANGED, /* the image's own, but the image is changed as the tail says */
    MODE_FILES,   /* read from an index file that the tail is */
    MODES
};

struct input {
    const uint8_t *control, *image, *tail;
    size_t image_size, tail_size;
};

static inline bool split_input(const uint8_t *data, size_t size, struct input *input) {
    if (size < CONTROL) {
        return false;
    }
    size_t rest = size - CONTROL, tail = (size_t)(data[CONTROL_TAIL] << 8 | data[CONTROL_TAIL + 1]);
    tail = tail > rest ? rest : tail;
    *input = (struct input){.control = data,
                            .image = data + CONTROL,
                            .image_size = rest - tail,
                            .tail = data + size - tail,
                            .tail_size = tail};
    return true;
}

#endif
