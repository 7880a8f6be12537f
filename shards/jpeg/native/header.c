/* The markers of a JPEG up to its first scan. Every length is checked against the file before it is followed. */

#include "jpeg.h"

#include <string.h>

const uint8_t natural_order[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

enum marker {
    SOF0 = 0xC0, /* baseline */
    SOF1 = 0xC1, /* extended sequential: the same, but for the number of tables */
    DHT = 0xC4,
    SOI = 0xD8,
    EOI = 0xD9,
    SOS = 0xDA,
    DQT = 0xDB,
    DRI = 0xDD,
    APP0 = 0xE0,
    APP14 = 0xEE,
    COM = 0xFE,
};

/* What the colours of three components are called, as libjpeg decides it (jdapimin.c, default_decompress_parms). */
struct colour_hints {
    bool jfif;
    int adobe_transform; /* -1 without an Adobe marker */
    uint8_t identifiers[MAX_COMPONENTS];
};

static int big16(const uint8_t *bytes) { return bytes[0] << 8 | bytes[1]; }

static int read_frame(const uint8_t *body, size_t length, struct frame *frame, struct colour_hints *hints) {
    if (frame->components != 0 || length < 6) {
        return STATUS_UNSUPPORTED;
    }
    frame->height = big16(body + 1);
    frame->width = big16(body + 3);
    int components = body[5];
    if (body[0] != 8 || !frame->width || !frame->height || (components != 1 && components != 3) ||
        length < 6 + 3 * (size_t)components) {
        return STATUS_UNSUPPORTED;
    }
    if ((uint64_t)frame->width * (uint64_t)frame->height > MAX_PIXELS) {
        return STATUS_TOO_LARGE;
    }
    frame->h_max = frame->v_max = 1;
    for (int c = 0; c < components; c++) {
        const uint8_t *bytes = body + 6 + 3 * c;
        struct component *component = &frame->component[c];
        hints->identifiers[c] = bytes[0];
        component->h = bytes[1] >> 4;
        component->v = bytes[1] & 15;
        component->quantization = bytes[2];
        if (component->h < 1 || component->h > 4 || component->v < 1 || component->v > 4 ||
            component->quantization > 3) {
            return STATUS_UNSUPPORTED;
        }
        if (components == 1) {
            component->h = component->v = 1; /* a single component is coded block by block (T.81, A.2.2) */
        }
        frame->h_max = component->h > frame->h_max ? component->h : frame->h_max;
        frame->v_max = component->v > frame->v_max ? component->v : frame->v_max;
    }
    frame->components = components;
    frame->mcu_width = 8 * frame->h_max;
    frame->mcu_height = 8 * frame->v_max;
    frame->mcus_across = (frame->width + frame->mcu_width - 1) / frame->mcu_width;
    frame->mcus_down = (frame->height + frame->mcu_height - 1) / frame->mcu_height;
    for (int c = 0; c < components; c++) {
        struct component *component = &frame->component[c];
        if (frame->h_max % component->h || frame->v_max % component->v) {
            return STATUS_UNSUPPORTED; /* libjpeg refuses fractional upsampling, too */
        }
        component->width = (frame->width * component->h + frame->h_max - 1) / frame->h_max;
        component->height = (frame->height * component->v + frame->v_max - 1) / frame->v_max;
        frame->blocks_per_mcu += component->h * component->v;
    }
    return frame->blocks_per_mcu <= MAX_BLOCKS_PER_MCU ? 0 : STATUS_UNSUPPORTED;
}

static int read_quantization(const uint8_t *body, size_t length, struct frame *frame) {
    while (length) {
        int number = body[0] & 15, wide = body[0] >> 4;
        if (number > 3 || wide || length < 65) {
            return STATUS_UNSUPPORTED; /* 16-bit steps are not baseline, and rare */
        }
        for (int k = 0; k < 64; k++) {
            frame->quantization[number][natural_order[k]] = body[1 + k];
        }
        frame->quantization_defined[number] = true;
        body += 65;
        length -= 65;
    }
    return 0;
}

static int read_huffman(const uint8_t *body, size_t length, struct frame *frame) {
    while (length) {
        if (length < 17) {
            return STATUS_UNSUPPORTED;
        }
        int number = body[0] & 15, is_ac = body[0] >> 4, symbols = 0;
        for (int bits = 1; bits <= 16; bits++) {
            symbols += body[bits];
        }
        if (number > 3 || is_ac > 1 || symbols > 256 || length < 17 + (size_t)symbols) {
            return STATUS_UNSUPPORTED;
        }
        struct huffman_spec *spec = is_ac ? &frame->ac[number] : &frame->dc[number];
        spec->bytes = body + 1;
        spec->symbols = symbols;
        body += 17 + symbols;
        length -= 17 + (size_t)symbols;
    }
    return 0;
}

/* All components in one scan, in the order of the frame, all coefficients at once. */
static int read_scan(const uint8_t *body, size_t length, struct frame *frame, const struct colour_hints *hints) {
    int components = frame->components;
    if (!components || length != 4 + 2 * (size_t)components || body[0] != components) {
        return STATUS_UNSUPPORTED;
    }
    for (int c = 0; c < components; c++) {
        struct component *component = &frame->component[c];
        component->dc = body[2 + 2 * c] >> 4;
        component->ac = body[2 + 2 * c] & 15;
        if (body[1 + 2 * c] != hints->identifiers[c] || component->dc > 3 || component->ac > 3 ||
            !frame->dc[component->dc].bytes || !frame->ac[component->ac].bytes ||
            !frame->quantization_defined[component->quantization]) {
            return STATUS_UNSUPPORTED;
        }
    }
    const uint8_t *spectral = body + 1 + 2 * components;
    return spectral[0] == 0 && spectral[1] == 63 && spectral[2] == 0 ? 0 : STATUS_UNSUPPORTED;
}

/* A block takes two bits at least: a few bytes that claim millions of pixels shall cost no memory. */
static int check_size(const struct frame *frame, size_t size) {
    size_t blocks = (size_t)frame->mcus_across * (size_t)frame->mcus_down * (size_t)frame->blocks_per_mcu;
    return blocks / 4 <= size - frame->scan_offset ? 0 : STATUS_DAMAGED;
}

static bool is_ycc(const struct colour_hints *hints) {
    if (hints->jfif) {
        return true;
    }
    if (hints->adobe_transform >= 0) {
        return hints->adobe_transform != 0;
    }
    return memcmp(hints->identifiers, "RGB", 3) != 0;
}

int read_header(const uint8_t *data, size_t size, struct frame *frame) {
    struct colour_hints hints = {.adobe_transform = -1};
    memset(frame, 0, sizeof *frame);
    if (size < 4 || data[0] != 0xFF || data[1] != SOI) {
        return STATUS_UNSUPPORTED;
    }
    size_t position = 2;
    for (;;) {
        if (size - position < 4 || data[position] != 0xFF) {
            return STATUS_UNSUPPORTED; /* libjpeg skips what lies between two markers; such files are rare */
        }
        int marker = data[position + 1];
        if (marker == 0xFF) {
            position++; /* a fill byte */
            continue;
        }
        size_t length = (size_t)big16(data + position + 2);
        if (length < 2 || length > size - position - 2) {
            return STATUS_UNSUPPORTED;
        }
        const uint8_t *body = data + position + 4;
        position += 2 + length;
        length -= 2;
        int status = 0;
        if (marker == SOF0 || marker == SOF1) {
            status = read_frame(body, length, frame, &hints);
        } else if (marker == DQT) {
            status = read_quantization(body, length, frame);
        } else if (marker == DHT) {
            status = read_huffman(body, length, frame);
        } else if (marker == DRI) {
            status = length == 2 ? 0 : STATUS_UNSUPPORTED;
            frame->restart_interval = status ? 0 : big16(body);
        } else if (marker == APP0) {
            hints.jfif |= length >= 14 && memcmp(body, "JFIF", 5) == 0;
        } else if (marker == APP14) {
            if (length >= 12 && memcmp(body, "Adobe", 5) == 0) {
                hints.adobe_transform = body[11];
            }
        } else if (marker == SOS) {
            status = read_scan(body, length, frame, &hints);
            if (!status && frame->components == 3 && !is_ycc(&hints)) {
                status = STATUS_UNSUPPORTED;
            }
            frame->scan_offset = position;
            return status ? status : check_size(frame, size);
        } else if (!((marker >= APP0 && marker < APP0 + 16) || marker == COM)) {
            return STATUS_UNSUPPORTED; /* progressive, lossless, arithmetic, hierarchical, DNL, … */
        }
        if (status) {
            return status;
        }
    }
}
