/* Included before every source of the fuzzer's build: buffers show where they were asked to end.

   A workspace's buffers are larger than they need to be, and an access beyond what was reserved would often be inside
   of what an earlier image needed. Here AddressSanitizer is told. Reserving also fails when the target asks for it.

   What the decoder inlines by force is left to the compiler: with a check at every access that is megabytes of code,
   which take minutes to build and are no faster. */
#ifndef ONEHOUR_FUZZ_WATCHED_BUFFER_H
#define ONEHOUR_FUZZ_WATCHED_BUFFER_H

#define reserve product_reserve
#include "buffer.h"
#undef reserve

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WATCHED 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define WATCHED 1
#endif

#if WATCHED
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#include "jpeg.h"
#undef ALWAYS_INLINE
#define ALWAYS_INLINE static inline __attribute__((unused))

extern int reservations_left; /* until one fails; below zero: none does */

static inline uint8_t *reserve(struct buffer *buffer, size_t size) {
    if (buffer->bytes) {
        ASAN_UNPOISON_MEMORY_REGION(buffer->bytes, buffer->capacity);
    }
    if (reservations_left >= 0 && reservations_left-- == 0) {
        release(buffer);
        return NULL;
    }
    uint8_t *bytes = product_reserve(buffer, size);
    if (bytes) {
        ASAN_POISON_MEMORY_REGION(bytes + size, buffer->capacity - size);
    }
    return bytes;
}

#endif
