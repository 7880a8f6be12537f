/* Entropy-coded bytes without their stuffing. */

#include "entropy.h"

#include <string.h>

size_t unstuff(const uint8_t *from, const uint8_t *end, const uint8_t *file_end, uint8_t *to, const uint8_t **stop) {
    uint8_t *start = to;
    while (from < end) {
        const uint8_t *marker = memchr(from, 0xFF, (size_t)(end - from));
        size_t plain = (size_t)((marker ? marker : end) - from);
        memcpy(to, from, plain);
        to += plain;
        from += plain;
        if (!marker) {
            break;
        }
        if (from + 1 >= file_end || from[1] != 0) {
            break; /* a marker, or nothing more */
        }
        *to++ = 0xFF;
        from += 2;
    }
    while (from < end && file_end - from > 2 && from[0] == 0xFF && from[1] == 0xFF) {
        from++; /* fill bytes before a marker (T.81, B.1.1.2) */
    }
    *stop = from;
    memset(to, 0, RUN_PADDING);
    return (size_t)(to - start);
}
