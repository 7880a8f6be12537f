/* Huffman tables, expanded so that most symbols cost one look-up.

   An AC entry holds a whole coefficient: code and value together are mostly shorter than the look-up, so the value is
   finished when the table is built, and decoding is: look up, store, advance. The rest goes through `slow_ac`. */
#ifndef ONEHOUR_HUFFMAN_H
#define ONEHOUR_HUFFMAN_H

#include "jpeg.h"

#define AC_BITS 11 /* of the look-up; 12 is no faster where the first cache has 32 KB, and takes longer to build */
#define DC_BITS 9

/* An AC entry: bits 0-5 bits used up, 8-15 how far the position advances, 16-31 the coefficient's value. */
#define AC_LENGTH(entry) ((entry) & 63u)
#define AC_ADVANCE(entry) ((entry) >> 8 & 255u)
#define AC_VALUE(entry) ((int16_t)((entry) >> 16))
#define ADVANCE_END 64u   /* the end of the block: no coefficient reaches so far */
#define ADVANCE_SLOW 128u /* the entry does not hold the coefficient, but length and symbol of a code short enough */
#define ADVANCE_WRONG 192u /* only from `slow_ac`: no such code */

struct huffman_codes {
    int32_t limit[17]; /* by length: the first code that is too large for it, aligned to 16 bits */
    int32_t offset[17]; /* symbol = symbols[offset + code] */
    uint8_t symbols[256];
    uint8_t spec[16 + 256]; /* what it was built from */
    int spec_size;          /* 0: nothing */
};

/* What may be skipped at once: bits 0-7 how far the position advances, SKIP_MANY if that cannot be said; bit 8 whether
   the block ends then; 9-15 bits used up. */
#define SKIP_ADVANCE(entry) ((entry) & 255u)
#define SKIP_ENDS(entry) ((entry) >> 8 & 1u)
#define SKIP_LENGTH(entry) ((unsigned)(entry) >> 9)
#define SKIP_MANY 128u

struct huffman_ac {
    uint32_t lookup[1 << AC_BITS];
    uint16_t skip[1 << AC_BITS]; /* filled by `build_skip` */
    bool can_skip;
    struct huffman_codes codes;
};

struct huffman_dc {
    uint16_t lookup[1 << DC_BITS]; /* bits 0-7 length of the code, 8-15 bits of the value; 0: a longer code */
    struct huffman_codes codes;
};

/* Expand a table, unless it is the one that is there: many images in a row have the same. False if no decoder could
   use it. */
bool build_ac(struct huffman_ac *table, const struct huffman_spec *spec);
bool build_dc(struct huffman_dc *table, const struct huffman_spec *spec);

/* Also fill the table that skips several symbols in one look-up. */
void build_skip(struct huffman_ac *table);

/* Any AC symbol, from at least 31 bits, the next one first, and what the look-up says of it; an entry as there, but
   never ADVANCE_SLOW. */
uint32_t slow_ac(const struct huffman_ac *table, uint64_t bits, uint32_t entry);

/* Any DC symbol: an entry as in the look-up, 0 if there is no such code. */
uint32_t slow_dc(const struct huffman_dc *table, uint64_t bits);

/* The value that `size` bits stand for (T.81, F.2.2.1): the next bits, the first one at the top. */
ALWAYS_INLINE int32_t extend(uint64_t bits, unsigned size) {
    int32_t value = (int32_t)(bits >> 1 >> (63 - size));
    return value + ((int32_t)((int64_t)~bits >> 63) & (1 - (int32_t)(1u << size)));
}

#endif
