/* Reading encoded images and their crop index records out of open files. */
#ifndef ONEHOUR_FILES_H
#define ONEHOUR_FILES_H

#include "workspace.h"

/* As shards.jpeg.EXTENT_DTYPE. */
struct extent {
    uint64_t offset;
    uint32_t size;
    int32_t descriptor;
    int32_t index_descriptor; /* -1: there is no crop index */
    uint32_t row;
};

/* Read an image into the workspace. Returns 0, STATUS_UNREADABLE or STATUS_NO_MEMORY. */
int read_image(struct workspace *workspace, const struct extent *extent);

/* Read its record into the workspace, whose record is never NULL then; *size is 0 if it cannot be had, which no record
   passes for. Returns 0 or STATUS_NO_MEMORY. */
int read_record(struct workspace *workspace, const struct extent *extent, size_t *size);

#endif
