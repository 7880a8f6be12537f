/* Checksums. */

#include "checksum.h"

/* Eight bytes at a time (Kounavis and Berry, "slicing-by-8"). */
static uint32_t crc_table[8][256];

__attribute__((constructor)) static void make_crc_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) {
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
        }
        crc_table[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++) {
        for (int k = 1; k < 8; k++) {
            crc_table[k][i] = crc_table[k - 1][i] >> 8 ^ crc_table[0][crc_table[k - 1][i] & 255];
        }
    }
}

uint32_t crc32_of(const uint8_t *bytes, size_t size) {
    uint32_t crc = ~0u;
    for (; size >= 8; size -= 8, bytes += 8) {
        uint32_t low = read32(bytes) ^ crc, high = read32(bytes + 4);
        crc = crc_table[7][low & 255] ^ crc_table[6][low >> 8 & 255] ^ crc_table[5][low >> 16 & 255] ^
              crc_table[4][low >> 24] ^ crc_table[3][high & 255] ^ crc_table[2][high >> 8 & 255] ^
              crc_table[1][high >> 16 & 255] ^ crc_table[0][high >> 24];
    }
    for (; size; size--, bytes++) {
        crc = crc >> 8 ^ crc_table[0][(crc ^ *bytes) & 255];
    }
    return ~crc;
}

/* Collet, "XXH64 algorithm description". */
#define PRIME_1 11400714785074694791u
#define PRIME_2 14029467366897019727u
#define PRIME_3 1609587929392839161u
#define PRIME_4 9650029242287828579u
#define PRIME_5 2870177450012600261u

static uint64_t rotate(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

static uint64_t mix(uint64_t lane, uint64_t input) { return rotate(lane + input * PRIME_2, 31) * PRIME_1; }

uint64_t xxh64_of(const uint8_t *bytes, size_t size) {
    uint64_t hash = PRIME_5;
    size_t left = size;
    if (size >= 32) {
        uint64_t lanes[4] = {PRIME_1 + PRIME_2, PRIME_2, 0, -PRIME_1};
        for (; left >= 32; left -= 32, bytes += 32) {
            for (int i = 0; i < 4; i++) {
                lanes[i] = mix(lanes[i], read64(bytes + 8 * i));
            }
        }
        hash = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
        for (int i = 0; i < 4; i++) {
            hash = (hash ^ mix(0, lanes[i])) * PRIME_1 + PRIME_4;
        }
    }
    hash += size;
    for (; left >= 8; left -= 8, bytes += 8) {
        hash = rotate(hash ^ mix(0, read64(bytes)), 27) * PRIME_1 + PRIME_4;
    }
    if (left >= 4) {
        hash = rotate(hash ^ read32(bytes) * PRIME_1, 23) * PRIME_2 + PRIME_3;
        left -= 4;
        bytes += 4;
    }
    for (; left; left--, bytes++) {
        hash = rotate(hash ^ *bytes * PRIME_5, 11) * PRIME_1;
    }
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}
