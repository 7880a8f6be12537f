/* Reading with pread: no position is shared, so threads may use one descriptor. */

#include "files.h"

#include "crop_index.h"

#include <errno.h>
#include <unistd.h>

#define FILE_HEADER 64     /* of a crop index, before its directory */
#define DIRECTORY_ENTRY 16 /* offset and size of a record */

static bool read_all(int descriptor, uint8_t *to, size_t size, uint64_t offset) {
    while (size) {
        ssize_t got = pread(descriptor, to, size, (off_t)offset);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return false;
        }
        to += got;
        size -= (size_t)got;
        offset += (uint64_t)got;
    }
    return true;
}

int read_image(struct workspace *workspace, const struct extent *extent) {
    if (!reserve(&workspace->image, (size_t)extent->size + 1)) {
        return STATUS_NO_MEMORY;
    }
    return read_all(extent->descriptor, workspace->image.bytes, extent->size, extent->offset) ? 0 : STATUS_UNREADABLE;
}

int read_record(struct workspace *workspace, const struct extent *extent, size_t *size) {
    uint8_t entry[DIRECTORY_ENTRY];
    *size = 0;
    /* even for no record there is a buffer: NULL would say that there is no index, and the image be decoded whole */
    if (!reserve(&workspace->record, RECORD_HEADER)) {
        return STATUS_NO_MEMORY;
    }
    uint64_t offset = FILE_HEADER + DIRECTORY_ENTRY * (uint64_t)extent->row;
    if (!read_all(extent->index_descriptor, entry, sizeof entry, offset)) {
        return 0;
    }
    offset = 0;
    size_t length = 0;
    for (int i = 7; i >= 0; i--) {
        offset = offset << 8 | entry[i];
        length = i < 4 ? length << 8 | entry[8 + i] : 0;
    }
    /* an entry is for one block at least, and a block takes two bits at least */
    if (length < RECORD_HEADER || length > RECORD_HEADER + ENTRY_BYTES * (4 * (size_t)extent->size + 1) ||
        offset > INT64_MAX - length) {
        return 0;
    }
    if (!reserve(&workspace->record, length)) {
        return STATUS_NO_MEMORY;
    }
    *size = read_all(extent->index_descriptor, workspace->record.bytes, length, offset) ? length : 0;
    return 0;
}
