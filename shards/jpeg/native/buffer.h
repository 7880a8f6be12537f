/* Memory that grows and is used again for the next image. */
#ifndef ONEHOUR_BUFFER_H
#define ONEHOUR_BUFFER_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct buffer {
    uint8_t *bytes; /* aligned to 64 */
    size_t capacity;
};

/* At least `size` bytes, all of them written to before; what was there is lost if it has to grow. NULL if there is no
   memory. */
static inline uint8_t *reserve(struct buffer *buffer, size_t size) {
    if (size > buffer->capacity) {
        free(buffer->bytes);
        size_t capacity = (size + size / 4 + 4095) & ~(size_t)4095;
        void *bytes = NULL;
        if (posix_memalign(&bytes, 64, capacity)) {
            bytes = NULL;
            capacity = 0;
        } else {
            memset(bytes, 0, capacity); /* kernels read some bytes beyond what was written */
        }
        buffer->bytes = bytes;
        buffer->capacity = capacity;
    }
    return buffer->bytes;
}

static inline void release(struct buffer *buffer) {
    free(buffer->bytes);
    *buffer = (struct buffer){0};
}

#endif
