/* Making, measuring and freeing workspaces, and the choice of kernels. */

#include "workspace.h"

const struct kernels *best_kernels(void) {
#if HAVE_AVX2_KERNELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
        return &kernels_avx2;
    }
#endif
    return &kernels_plain;
}

void init_workspace(struct workspace *workspace, const struct kernels *kernels) {
    memset(workspace, 0, sizeof *workspace);
    workspace->kernels = kernels;
}

#define FOR_EACH_BUFFER(workspace, action)                                                                             \
    do {                                                                                                               \
        action(&(workspace)->image);                                                                                   \
        action(&(workspace)->record);                                                                                  \
        action(&(workspace)->bytes);                                                                                   \
        action(&(workspace)->runs);                                                                                    \
        action(&(workspace)->coefficients);                                                                            \
        action(&(workspace)->lengths);                                                                                 \
        action(&(workspace)->rows);                                                                                    \
        action(&(workspace)->across);                                                                                  \
        action(&(workspace)->whole);                                                                                   \
        for (int i = 0; i < MAX_COMPONENTS; i++) {                                                                     \
            action(&(workspace)->planes[i]);                                                                           \
        }                                                                                                              \
        for (int i = 0; i < 2; i++) {                                                                                  \
            action(&(workspace)->filters[i]);                                                                          \
            action(&(workspace)->starts[i]);                                                                           \
        }                                                                                                              \
    } while (0)

size_t workspace_size(const struct workspace *workspace) {
    size_t size = 0;
#define ADD(buffer) size += (buffer)->capacity
    FOR_EACH_BUFFER(workspace, ADD);
#undef ADD
    return size;
}

void free_workspace(struct workspace *workspace) { FOR_EACH_BUFFER(workspace, release); }
