/* Mutations that know what a JPEG is. Of random changes nearly all would end at a marker or in the first blocks. */

#include "input.h"

#include "jpeg.h"

#include <stdlib.h>
#include <string.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

static uint64_t random_state;

static unsigned below(unsigned limit) { /* SplitMix64 */
    uint64_t z = (random_state += 0x9E3779B97F4A7C15u);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (unsigned)((z ^ z >> 31) % limit);
}

/* An input in pieces, as it is put together again. */
#define MOST_BYTES (1 << 16)
static uint8_t image[MOST_BYTES + 64];
static size_t image_size, scan; /* scan: where the entropy-coded data begin, or image_size */

struct segment {
    size_t start, body, end; /* of the marker, of what it holds, of the next marker */
    uint8_t marker;
};
static struct segment segments[64];
static int segment_count;

static void find_segments(void) {
    size_t at = 2;
    segment_count = 0;
    scan = image_size;
    while (at + 4 <= image_size && image[at] == 0xFF && segment_count < 64) {
        size_t length = (size_t)(image[at + 2] << 8 | image[at + 3]);
        if (length < 2 || at + 2 + length > image_size) {
            return;
        }
        segments[segment_count++] =
            (struct segment){.start = at, .body = at + 4, .end = at + 2 + length, .marker = image[at + 1]};
        at += 2 + length;
        if (segments[segment_count - 1].marker == 0xDA) {
            scan = at;
            return;
        }
    }
}

static const struct segment *any_segment(int marker) {
    const struct segment *found = NULL;
    unsigned seen = 0;
    for (int i = 0; i < segment_count; i++) {
        if ((marker == 0 || segments[i].marker == marker) && segments[i].end > segments[i].body && below(++seen) == 0) {
            found = &segments[i];
        }
    }
    return found;
}

/* Put `added` bytes in place of `removed` ones. */
static void replace(size_t at, size_t removed, const uint8_t *bytes, size_t added, size_t most) {
    if (at + removed > image_size || image_size - removed + added > most) {
        return;
    }
    memmove(image + at + added, image + at + removed, image_size - at - removed);
    memcpy(image + at, bytes, added);
    image_size += added - removed;
}

/* ---------------------------------------------------------------- the header */

static void change_frame(size_t most) {
    (void)most;
    static const uint8_t factors[] = {0x11, 0x21, 0x12, 0x22, 0x41, 0x14, 0x42,
                                      0x24, 0x31, 0x13, 0x44, 0x33, 0x23, 0x01};
    const struct segment *frame = any_segment(0xC0);
    if (!frame || frame->end - frame->body < 6) {
        return;
    }
    uint8_t *body = image + frame->body;
    size_t component = below(3), at = 6 + 3 * component;
    switch (below(6)) {
    case 0: /* a size */
        body[1 + 2 * below(2)] = (uint8_t)(below(8) ? 0 : below(8) ? below(4) : below(256));
        body[2 + 2 * below(2)] = (uint8_t)(1 + below(below(2) ? 16 : 255));
        break;
    case 1:
        body[2 + 2 * below(2)] += (uint8_t)(below(2) ? 1 : 255);
        break;
    case 2:
    case 3:
        if (frame->body + at + 2 < frame->end) {
            body[at + 1] = factors[below(sizeof factors)];
        }
        break;
    case 4:
        if (frame->body + at + 2 < frame->end) {
            body[at + 2] = (uint8_t)below(below(4) ? 2 : 5);
        }
        break;
    default:
        body[below((unsigned)(frame->end - frame->body))] ^= (uint8_t)(1u << below(8));
    }
}

static void change_tables(size_t most) {
    (void)most;
    const struct segment *table = any_segment(0xC4);
    if (!table || table->end - table->body < 17) {
        return;
    }
    uint8_t *body = image + table->body, *counts = body + 1;
    unsigned from = below(16), to = below(16), symbols = (unsigned)(table->end - table->body - 17);
    switch (below(5)) {
    case 0: /* a code of another length */
    case 1:
        if (counts[from]) {
            counts[from]--;
            counts[to]++;
        }
        break;
    case 2:
        if (symbols) {
            static const uint8_t often[] = {0x00, 0xF0, 0x01, 0x0F, 0xFF, 0x10, 0xF1, 0x0B, 0x0C, 0x1F};
            body[17 + below(symbols)] = below(2) ? often[below(sizeof often)] : (uint8_t)below(256);
        }
        break;
    case 3: /* all codes as long as can be */
        if (symbols && symbols < 256) {
            memset(counts, 0, 16);
            counts[below(2) ? 15 : 7 + below(9)] = (uint8_t)symbols;
        }
        break;
    default:
        body[0] = (uint8_t)(below(2) << 4 | below(below(8) ? 2 : 5));
    }
}

static void change_restarts(size_t most) {
    const struct segment *interval = any_segment(0xDD);
    uint8_t segment[] = {0xFF, 0xDD, 0, 4, 0, (uint8_t)(below(4) ? 1 + below(12) : below(256))};
    if (interval && interval->end - interval->body == 2) {
        image[interval->body + 1] = segment[5];
    } else if (scan < image_size) {
        replace(segments[segment_count - 1].start, 0, segment, sizeof segment, most);
    }
}

static void change_header(size_t most) {
    const struct segment *one = any_segment(0), *other = any_segment(0);
    if (!one) {
        return;
    }
    static uint8_t copy[MOST_BYTES];
    size_t size = other->end - other->start, length = one->end - one->body;
    switch (below(10)) {
    case 9: /* the file ends within the segment, which says so */
        image_size = one->end - below((unsigned)(below(2) && length > 3 ? 3 : length));
        image[one->start + 2] = (uint8_t)((image_size - one->start - 2) >> 8);
        image[one->start + 3] = (uint8_t)(image_size - one->start - 2);
        break;
    case 0: /* once more */
        memcpy(copy, image + other->start, size);
        replace(one->start, 0, copy, size, most);
        break;
    case 1:
        replace(one->start, one->end - one->start, copy, 0, most);
        break;
    case 2: { /* a fill byte, and a wrong length */
        uint8_t fill = 0xFF;
        if (below(2)) {
            replace(one->start, 0, &fill, 1, most);
        } else {
            image[one->start + 3] += (uint8_t)(below(5) - 2);
        }
        break;
    }
    case 3:
        image[one->start + 1] = (uint8_t)(0xC0 + below(64));
        break;
    case 4: {
        const struct segment *start = any_segment(0xDA);
        if (start) {
            image[start->body + below((unsigned)(start->end - start->body))] =
                (uint8_t)(below(3) ? below(4) << 4 | below(4) : below(256));
        }
        break;
    }
    case 5: {
        const struct segment *steps = any_segment(0xDB);
        if (steps && steps->end - steps->body >= 65) {
            image[steps->body + 1 + below(64)] = (uint8_t)(below(2) ? below(4) * 85 : below(256));
        }
        break;
    }
    default:
        image[one->body + below((unsigned)length)] = (uint8_t)below(256);
    }
}

/* ---------------------------------------------------------------- the entropy-coded data */

static void change_scan(size_t most) {
    if (scan >= image_size) {
        return;
    }
    unsigned length = (unsigned)(image_size - scan);
    size_t at = scan + below(length);
    uint8_t bytes[16];
    for (size_t i = 0; i < sizeof bytes; i++) {
        bytes[i] = (uint8_t)below(255);
    }
    switch (below(10)) {
    case 9: /* the number of a restart marker */
        for (size_t i = at; i + 1 < image_size; i++) {
            if (image[i] == 0xFF && (image[i + 1] & 0xF8) == 0xD0) {
                image[i + 1] ^= (uint8_t)(1 + below(7));
                break;
            }
        }
        break;
    case 0:
        replace(at, 0, bytes, 1 + below(8), most);
        break;
    case 1:
        replace(at, 1 + below(8), bytes, 0, most);
        break;
    case 2: { /* a marker, or stuffing */
        uint8_t marker[] = {0xFF, (uint8_t)(below(3) ? 0xD0 + below(8) : below(2) ? 0 : 0xD9)};
        replace(at, below(3), marker, 2, most);
        break;
    }
    case 3: /* cut off, with or without an end */
        image_size = at;
        if (below(2) && image_size + 2 <= most) {
            image[image_size++] = 0xFF;
            image[image_size++] = 0xD9;
        }
        break;
    case 4: { /* a part of it once more */
        static uint8_t part[256];
        size_t from = scan + below(length), size = image_size - from;
        size = size > sizeof part ? sizeof part : size;
        memcpy(part, image + from, size);
        replace(at, below(2) ? (size < image_size - at ? size : 0) : 0, part, size, most);
        break;
    }
    case 5:
        image[at] = (uint8_t)below(255);
        break;
    default:
        image[at] ^= (uint8_t)(1u << below(8));
    }
}

/* Codes of a table: symbol, code and length of each. */
struct code {
    uint16_t bits;
    uint8_t length, symbol;
};

static int list_codes(const struct huffman_spec *spec, struct code *codes) {
    unsigned code = 0;
    int index = 0;
    for (unsigned length = 1; length <= 16; length++, code <<= 1) {
        for (int i = 0; i < spec->bytes[length - 1]; i++, code++, index++) {
            if (code >> length) {
                return 0;
            }
            codes[index] = (struct code){(uint16_t)code, (uint8_t)length, spec->bytes[16 + index]};
        }
    }
    return index;
}

struct writer {
    size_t at, most;
    uint32_t bits;
    unsigned count;
};

static void put(struct writer *writer, uint32_t bits, unsigned count) {
    for (; count; count--) {
        writer->bits = writer->bits << 1 | (bits >> (count - 1) & 1);
        if (++writer->count == 8) {
            if (writer->at + 2 <= writer->most) {
                image[writer->at++] = (uint8_t)writer->bits;
                if ((writer->bits & 255) == 255) {
                    image[writer->at++] = 0;
                }
            }
            writer->count = 0;
        }
    }
}

/* A scan that decodes, whatever the header asks for: random symbols of its own tables, as many as there is room for.
   What is too long all the same is cut off. */
static void write_scan(size_t most) {
    static struct code dc[4][256], ac[4][256];
    struct frame frame;
    int dc_count[4] = {0}, ac_count[4] = {0};
    if (scan >= image_size || read_header(image, image_size, &frame)) {
        return;
    }
    for (int i = 0; i < 4; i++) {
        dc_count[i] = frame.dc[i].bytes ? list_codes(&frame.dc[i], dc[i]) : 0;
        ac_count[i] = frame.ac[i].bytes ? list_codes(&frame.ac[i], ac[i]) : 0;
    }
    struct writer writer = {.at = scan, .most = most - 2};
    unsigned most_symbols = below(3) ? 1 + below(6) : 64, restart = 0;
    int mcus = frame.mcus_across * frame.mcus_down, level[MAX_COMPONENTS] = {0};
    size_t room = (writer.most - scan) / ((size_t)mcus * (size_t)frame.blocks_per_mcu) / 2; /* of two bytes each */
    if (writer.most < scan || (room < most_symbols && below(16))) {
        most_symbols = writer.most < scan ? 0 : (unsigned)room;
    }
    for (int mcu = 0; mcu < mcus && writer.at + 2 <= writer.most; mcu++) {
        if (frame.restart_interval && mcu && mcu % frame.restart_interval == 0) {
            put(&writer, 127, writer.count ? 8 - writer.count : 0);
            if (writer.at + 2 <= writer.most) {
                image[writer.at++] = 0xFF;
                image[writer.at++] = (uint8_t)(0xD0 + (restart++ & 7));
            }
            memset(level, 0, sizeof level);
        }
        for (int c = 0; c < frame.components; c++) {
            const struct component *part = &frame.component[c];
            for (int block = 0; block < part->h * part->v; block++) {
                if (!dc_count[part->dc] || !ac_count[part->ac]) {
                    return;
                }
                const struct code *code = &dc[part->dc][below((unsigned)dc_count[part->dc])];
                for (int tries = 0; tries < 4; tries++) { /* towards a small one: predictors that an index can hold */
                    const struct code *other = &dc[part->dc][below((unsigned)dc_count[part->dc])];
                    code = other->symbol < code->symbol ? other : code;
                }
                unsigned size = code->symbol & 15, value = below(1u << size);
                if (size && level[c] > 0) {
                    value &= ~(1u << (size - 1)); /* back towards zero */
                }
                level[c] += size ? (value >> (size - 1) ? (int)value : (int)value + 1 - (1 << size)) : 0;
                put(&writer, code->bits, code->length);
                put(&writer, value, size);
                for (unsigned position = 1, symbols = 0; position < 64;) {
                    const struct code *next = &ac[part->ac][below((unsigned)ac_count[part->ac])];
                    bool must_end = ++symbols > most_symbols;
                    for (int i = 0; i < ac_count[part->ac]; i++) {
                        unsigned advance = next->symbol & 15 || next->symbol == 0xF0 ? 1u + (next->symbol >> 4) : 0;
                        if (position + advance <= 64 && !(must_end && advance)) {
                            break;
                        }
                        next = &ac[part->ac][i];
                    }
                    put(&writer, next->bits, next->length);
                    put(&writer, below(1u << (next->symbol & 15)), next->symbol & 15);
                    if (!(next->symbol & 15) && next->symbol != 0xF0) {
                        break;
                    }
                    position += 1u + (next->symbol >> 4);
                }
            }
        }
    }
    put(&writer, 127, writer.count ? 8 - writer.count : 0);
    image_size = writer.at;
    image[image_size++] = 0xFF;
    image[image_size++] = 0xD9;
}

/* ---------------------------------------------------------------- whole inputs */

static bool is_readable(void) {
    struct frame frame;
    return read_header(image, image_size, &frame) == 0;
}

/* Change the header, mostly to one that is accepted: refusals are soon explored. Mostly with a scan that fits it. */
static void change_accepted(void (*change)(size_t most), size_t most) {
    static uint8_t kept[MOST_BYTES];
    size_t kept_size = image_size;
    bool was_readable = is_readable();
    memcpy(kept, image, image_size);
    for (int tries = 0; tries < 4; tries++) {
        find_segments();
        change(most);
        if (!was_readable || is_readable() || below(8) == 0) {
            break;
        }
        memcpy(image, kept, kept_size);
        image_size = kept_size;
    }
    find_segments();
    if (below(4)) {
        write_scan(most);
    }
}

/* An image that is refused has few descendants that are not: mostly the last one that was not takes its place. */
static void replace_refused(size_t most) {
    static uint8_t accepted[MOST_BYTES];
    static size_t accepted_size;
    if (is_readable()) {
        memcpy(accepted, image, image_size);
        accepted_size = image_size;
    } else if (accepted_size && accepted_size <= most && below(8)) {
        memcpy(image, accepted, accepted_size);
        image_size = accepted_size;
    }
}

/* Drawn anew for every input, so that no line of descent goes without any check. */
static uint8_t any_flags(void) {
    unsigned flags = below(2) ? FLAG_PLAIN : 0;
    flags |= below(4) ? 0 : FLAG_KERNELS;
    flags |= below(8) ? 0 : FLAG_AGAIN;
    flags |= below(8) ? 0 : FLAG_OTHER_ROW;
    flags |= below(4) ? 0 : FLAG_RECTANGLE;
    flags |= below(16) ? 0 : FLAG_STARVE;
    flags |= below(16) ? 0 : FLAG_LARGE;
    return (uint8_t)flags;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    static uint8_t tail[4096];
    random_state = seed;
    struct input input;
    if (max_size < 256 || below(16) == 0 || !split_input(data, size, &input) || input.image_size > MOST_BYTES ||
        input.tail_size > sizeof tail) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    uint8_t control[CONTROL];
    size_t tail_size = input.tail_size, most = max_size - CONTROL - tail_size;
    most = most > MOST_BYTES ? MOST_BYTES : most;
    memcpy(control, input.control, CONTROL);
    memcpy(image, input.image, input.image_size);
    memcpy(tail, input.tail, tail_size);
    image_size = input.image_size;
    control[CONTROL_FLAGS] = any_flags();
    replace_refused(most);
    for (unsigned rounds = 1 + below(3); rounds; rounds--) {
        find_segments();
        switch (below(12)) {
        case 0:
            control[below(CONTROL_TAIL)] = (uint8_t)below(256);
            break;
        case 1:
            control[CONTROL_MODE] = (uint8_t)below(MODES);
            break;
        case 2:
            change_accepted(change_frame, most);
            break;
        case 3:
            change_accepted(change_tables, most);
            break;
        case 4:
            change_accepted(change_restarts, most);
            break;
        case 5:
            change_accepted(change_header, most);
            break;
        case 6:
            change_scan(most);
            break;
        case 7:
        case 8:
        case 9:
            write_scan(most);
            break;
        default: {
            size_t room = max_size - CONTROL - image_size;
            room = room > sizeof tail ? sizeof tail : room;
            tail_size = LLVMFuzzerMutate(tail, tail_size, room < 1 ? tail_size : room > 96 && below(16) ? 96 : room);
            most = max_size - CONTROL - tail_size;
            most = most > MOST_BYTES ? MOST_BYTES : most;
        }
        }
    }
    if (CONTROL + image_size + tail_size > max_size) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    control[CONTROL_TAIL] = (uint8_t)(tail_size >> 8);
    control[CONTROL_TAIL + 1] = (uint8_t)tail_size;
    memcpy(data, control, CONTROL);
    memcpy(data + CONTROL, image, image_size);
    memcpy(data + CONTROL + image_size, tail, tail_size);
    return CONTROL + image_size + tail_size;
}

/* The header of one, the scan of the other, or a scan that fits the header. */
size_t LLVMFuzzerCustomCrossOver(const uint8_t *one, size_t one_size, const uint8_t *other, size_t other_size,
                                 uint8_t *out, size_t max_size, unsigned seed) {
    struct input first, second;
    random_state = seed;
    if (!split_input(one, one_size, &first) || !split_input(other, other_size, &second) ||
        first.image_size > MOST_BYTES || second.image_size > MOST_BYTES) {
        return 0;
    }
    memcpy(image, second.image, second.image_size);
    image_size = second.image_size;
    find_segments();
    size_t second_scan = scan;
    memcpy(image, first.image, first.image_size);
    image_size = first.image_size;
    find_segments();
    size_t rest = second.image_size - second_scan, size = CONTROL + scan + rest + first.tail_size;
    if (size > max_size || scan + rest > MOST_BYTES) {
        return 0;
    }
    memcpy(image + scan, second.image + second_scan, rest);
    image_size = scan + rest;
    if (below(2) && max_size > CONTROL + first.tail_size + image_size) { /* mostly the tables are others */
        find_segments();
        write_scan(max_size - CONTROL - first.tail_size > MOST_BYTES ? MOST_BYTES
                                                                     : max_size - CONTROL - first.tail_size);
    }
    memcpy(out, one, CONTROL);
    memcpy(out + CONTROL, image, image_size);
    memcpy(out + CONTROL + image_size, first.tail, first.tail_size);
    out[CONTROL_TAIL] = (uint8_t)(first.tail_size >> 8);
    out[CONTROL_TAIL + 1] = (uint8_t)first.tail_size;
    return CONTROL + image_size + first.tail_size;
}
