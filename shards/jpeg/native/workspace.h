/* Everything that decoding one image after the other needs and keeps: one for each thread that decodes. */
#ifndef ONEHOUR_WORKSPACE_H
#define ONEHOUR_WORKSPACE_H

#include "buffer.h"
#include "kernels.h"

struct workspace {
    const struct kernels *kernels;
    struct huffman_dc dc[4];
    struct huffman_ac ac[4];
    struct buffer image;        /* the encoded image */
    struct buffer record;       /* its crop index record */
    struct buffer bytes;        /* entropy-coded data without stuffing */
    struct buffer runs;         /* struct run */
    struct buffer coefficients; /* of some rows of MCUs */
    struct buffer lengths;
    struct buffer planes[MAX_COMPONENTS];
    struct buffer rows;     /* a few rows of pixels and of upsampled chroma */
    struct buffer across;   /* all rows after resampling across */
    struct buffer filters[2]; /* weights */
    struct buffer starts[2];
    struct buffer whole;    /* an image at its final size, before padding */
};

/* The best kernels for this processor. */
const struct kernels *best_kernels(void);

void init_workspace(struct workspace *workspace, const struct kernels *kernels);

/* Bytes of memory that it holds. */
size_t workspace_size(const struct workspace *workspace);

void free_workspace(struct workspace *workspace);

#endif
