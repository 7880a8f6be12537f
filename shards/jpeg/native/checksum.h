/* Checksums, and the little-endian numbers that they and the crop index are made of. */
#ifndef ONEHOUR_CHECKSUM_H
#define ONEHOUR_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

static inline uint32_t read32(const uint8_t *bytes) {
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static inline uint64_t read64(const uint8_t *bytes) { return read32(bytes) | (uint64_t)read32(bytes + 4) << 32; }

/* CRC-32, as zlib and PNG have it: of a record. */
uint32_t crc32_of(const uint8_t *bytes, size_t size);

/* XXH64 with seed 0: of an image, for it takes a twentieth of the time. */
uint64_t xxh64_of(const uint8_t *bytes, size_t size);

#endif
