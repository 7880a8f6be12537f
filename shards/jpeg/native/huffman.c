/* Building Huffman tables (T.81, annex C), and the symbols that the look-up does not hold. */

#include "huffman.h"

#include <string.h>

/* Codes by length; false for counts that no prefix code has (libjpeg: jpeg_make_d_derived_tbl). */
static bool build_codes(struct huffman_codes *codes, const struct huffman_spec *spec) {
    int32_t code = 0;
    int index = 0;
    codes->spec_size = 0;
    memset(codes->symbols, 0, sizeof codes->symbols);
    memcpy(codes->symbols, spec->bytes + 16, (size_t)spec->symbols);
    codes->limit[0] = codes->offset[0] = 0;
    for (int length = 1; length <= 16; length++) {
        int count = spec->bytes[length - 1];
        if (count && code + count >= 1 << length) {
            return false; /* no code is all ones */
        }
        codes->offset[length] = index - code;
        index += count;
        code += count;
        codes->limit[length] = code << (16 - length);
        code <<= 1;
    }
    memcpy(codes->spec, spec->bytes, 16 + (size_t)spec->symbols);
    codes->spec_size = 16 + spec->symbols;
    return true;
}

static bool is_built(const struct huffman_codes *codes, const struct huffman_spec *spec) {
    return codes->spec_size == 16 + spec->symbols && memcmp(codes->spec, spec->bytes, (size_t)codes->spec_size) == 0;
}

/* Symbol and length of the code that the bits begin with; length 0 if there is none. */
static int find_symbol(const struct huffman_codes *codes, uint64_t bits, int *length) {
    int32_t next = (int32_t)(bits >> 48);
    for (int candidate = 1; candidate <= 16; candidate++) {
        if (next < codes->limit[candidate]) {
            *length = candidate;
            return codes->symbols[(codes->offset[candidate] + (next >> (16 - candidate))) & 255];
        }
    }
    *length = 0;
    return 0;
}

uint32_t slow_ac(const struct huffman_ac *table, uint64_t bits, uint32_t entry) {
    int length = (int)AC_LENGTH(entry);
    unsigned symbol = entry >> 16;
    if (AC_ADVANCE(entry) != ADVANCE_SLOW || !length) {
        symbol = (unsigned)find_symbol(&table->codes, bits, &length);
    }
    if (!length) {
        return ADVANCE_WRONG << 8;
    }
    unsigned run = symbol >> 4, size = symbol & 15;
    if (!size) {
        return (uint32_t)length | (run == 15 ? 16u : ADVANCE_END) << 8;
    }
    int32_t value = extend(bits << length, size);
    return ((uint32_t)length + size) | (run + 1) << 8 | (uint32_t)(uint16_t)value << 16;
}

uint32_t slow_dc(const struct huffman_dc *table, uint64_t bits) {
    int length;
    uint32_t size = (uint32_t)find_symbol(&table->codes, bits, &length);
    return length ? (uint32_t)length | size << 8 : 0;
}

bool build_ac(struct huffman_ac *table, const struct huffman_spec *spec) {
    if (is_built(&table->codes, spec)) {
        return true;
    }
    if (!build_codes(&table->codes, spec)) {
        return false;
    }
    /* codes of ascending length fill the table from the front, without gaps */
    uint32_t *entry = table->lookup, *end = table->lookup + (1 << AC_BITS);
    const uint8_t *symbol = spec->bytes + 16;
    for (int length = 1; length <= AC_BITS; length++) {
        for (int i = 0; i < spec->bytes[length - 1]; i++, symbol++) {
            unsigned run = *symbol >> 4, size = *symbol & 15;
            int spare = AC_BITS - length - (int)size; /* bits after code and value */
            if (!size) {
                uint32_t whole = (uint32_t)length | (run == 15 ? 16u : ADVANCE_END) << 8;
                for (int k = 0; k < 1 << spare; k++) {
                    *entry++ = whole;
                }
            } else if (spare >= 0) {
                for (int32_t pattern = 0; pattern < 1 << size; pattern++) {
                    int32_t value = pattern < 1 << (size - 1) ? pattern + 1 - (1 << size) : pattern;
                    uint32_t whole =
                        ((uint32_t)length + size) | (run + 1) << 8 | (uint32_t)(uint16_t)value << 16;
                    for (int k = 0; k < 1 << spare; k++) {
                        *entry++ = whole;
                    }
                }
            } else {
                for (int k = 0; k < 1 << (AC_BITS - length); k++) {
                    *entry++ = (uint32_t)length | ADVANCE_SLOW << 8 | (uint32_t)*symbol << 16;
                }
            }
        }
    }
    while (entry < end) {
        *entry++ = ADVANCE_SLOW << 8;
    }
    table->can_skip = false;
    return true;
}

void build_skip(struct huffman_ac *table) {
    if (table->can_skip) {
        return;
    }
    for (uint32_t bits = 0; bits < 1 << AC_BITS; bits++) {
        unsigned used = 0, advance = 0, ends = 0;
        while (!ends) {
            uint32_t entry = table->lookup[bits << used & ((1 << AC_BITS) - 1)];
            unsigned step = AC_ADVANCE(entry), length = AC_LENGTH(entry);
            if (step >= ADVANCE_SLOW || used + length > AC_BITS) {
                break; /* it depends on bits that are not seen here */
            }
            used += length;
            ends = step == ADVANCE_END;
            advance += ends ? 0 : step;
        }
        table->skip[bits] = (uint16_t)((used && advance < SKIP_MANY ? advance : SKIP_MANY) | ends << 8 | used << 9);
    }
    table->can_skip = true;
}

bool build_dc(struct huffman_dc *table, const struct huffman_spec *spec) {
    if (is_built(&table->codes, spec)) {
        return true;
    }
    for (int i = 0; i < spec->symbols; i++) {
        if (spec->bytes[16 + i] > 15) {
            table->codes.spec_size = 0;
            return false; /* the size of a difference: libjpeg refuses more, too */
        }
    }
    if (!build_codes(&table->codes, spec)) {
        return false;
    }
    uint16_t *entry = table->lookup, *end = table->lookup + (1 << DC_BITS);
    const uint8_t *symbol = spec->bytes + 16;
    for (int length = 1; length <= DC_BITS; length++) {
        for (int i = 0; i < spec->bytes[length - 1]; i++, symbol++) {
            for (int k = 0; k < 1 << (DC_BITS - length); k++) {
                *entry++ = (uint16_t)(length | *symbol << 8);
            }
        }
    }
    while (entry < end) {
        *entry++ = 0;
    }
    return true;
}
