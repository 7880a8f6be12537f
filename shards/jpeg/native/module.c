/* What Python sees; shards/jpeg/__init__.py alone calls it, and checks the types of arrays. The interpreter's lock is
   released while images are read, decoded for training or evaluation, and indexed. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "crop_index.h"
#include "decode.h"
#include "files.h"
#include "region.h"

/* Workspaces that no thread uses at the moment; the interpreter's lock guards them. */
#define MOST_IDLE 64
#define MOST_KEPT (32u << 20) /* bytes: one that a huge image has inflated is freed */

static struct workspace *idle[MOST_IDLE];
static int idle_count;
static const struct kernels *chosen;

static struct workspace *take_workspace(void) {
    if (idle_count) {
        struct workspace *workspace = idle[--idle_count];
        workspace->kernels = chosen;
        return workspace;
    }
    struct workspace *workspace = malloc(sizeof *workspace);
    if (!workspace) {
        PyErr_NoMemory();
        return NULL;
    }
    init_workspace(workspace, chosen);
    return workspace;
}

static void give_back(struct workspace *workspace) {
    if (idle_count < MOST_IDLE && workspace_size(workspace) <= MOST_KEPT) {
        idle[idle_count++] = workspace;
    } else {
        free_workspace(workspace);
        free(workspace);
    }
}

static bool check(bool condition, const char *what) {
    if (!condition) {
        PyErr_SetString(PyExc_ValueError, what);
    }
    return condition;
}

#define LONGEST_SIDE 32767 /* so that scaled sizes, at most this times 65535, fit into 31 bits */

/* For "O&": the tuple of Views.pack. */
static int as_transform(PyObject *packed, void *to) {
    struct transform *transform = to;
    unsigned long long key[2];
    int crop, flip;
    if (!PyArg_ParseTuple(packed, "iiKKddddddiii", &transform->size, &crop, &key[0], &key[1], &transform->scale[0],
                          &transform->scale[1], &transform->ratio[0], &transform->ratio[1], &transform->log_ratio[0],
                          &transform->log_ratio[1], &transform->padding, &flip, &transform->evaluation_resize)) {
        return 0;
    }
    transform->crop = (enum crop)crop;
    transform->flip = flip;
    transform->key[0] = key[0];
    transform->key[1] = key[1];
    if (!check(crop >= CROP_RESIZED && crop <= CROP_EVALUATION, "no such way of cropping") ||
        !check(transform->size > 0 && transform->size <= LONGEST_SIDE && transform->padding >= 0 &&
                   transform->padding <= LONGEST_SIDE && transform->evaluation_resize <= LONGEST_SIDE,
               "sizes must be from 1 to 32,767 pixels") ||
        !check(transform->evaluation_resize >= transform->size, "the image is scaled to less than is cut out of it")) {
        return 0;
    }
    for (int i = 0; i < 2 && transform->crop == CROP_RESIZED; i++) {
        if (!check(transform->scale[i] > 0 && transform->scale[i] <= 1, "scale must be shares of the area") ||
            !check(transform->ratio[i] > 0 && transform->ratio[i] < 1e4, "ratio must be of width to height")) {
            return 0;
        }
    }
    return 1;
}

/* load_files(transform, extents, epochs, samples, out, status, stop); stop is a byte that ends the call, or None */
static PyObject *load_files(PyObject *module, PyObject *args) {
    (void)module;
    struct transform transform;
    Py_buffer extents, epochs, samples, out, status, stop;
    if (!PyArg_ParseTuple(args, "O&y*y*y*w*w*z*", as_transform, &transform, &extents, &epochs, &samples, &out, &status,
                          &stop)) {
        return NULL;
    }
    Py_ssize_t count = extents.len / (Py_ssize_t)sizeof(struct extent);
    Py_ssize_t pixels = (Py_ssize_t)transform.size * transform.size * 3;
    struct workspace *workspace = NULL;
    if (check(extents.len % (Py_ssize_t)sizeof(struct extent) == 0 && epochs.len == 8 * count &&
                  samples.len == 8 * count && status.len == 4 * count && out.len == pixels * count &&
                  (!stop.buf || stop.len == 1),
              "buffers of different lengths") &&
        (workspace = take_workspace())) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++) {
            struct extent extent;
            int64_t epoch, sample;
            size_t record_size = 0;
            memcpy(&extent, (const char *)extents.buf + i * (Py_ssize_t)sizeof extent, sizeof extent);
            memcpy(&epoch, (const char *)epochs.buf + 8 * i, sizeof epoch);
            memcpy(&sample, (const char *)samples.buf + 8 * i, sizeof sample);
            bool is_indexed = extent.index_descriptor >= 0;
            bool is_stopped = stop.buf && __atomic_load_n((const uint8_t *)stop.buf, __ATOMIC_RELAXED);
            int32_t result = is_stopped ? STATUS_STOPPED : read_image(workspace, &extent);
            if (!result && is_indexed) {
                result = read_record(workspace, &extent, &record_size);
            }
            if (!result) {
                result = decode_view(workspace, workspace->image.bytes, extent.size,
                                     is_indexed ? workspace->record.bytes : NULL, record_size, extent.row, &transform,
                                     (uint64_t)epoch, (uint64_t)sample, (uint8_t *)out.buf + i * pixels);
            }
            memcpy((char *)status.buf + 4 * i, &result, sizeof result);
        }
        Py_END_ALLOW_THREADS
        give_back(workspace);
    }
    PyBuffer_Release(&extents);
    PyBuffer_Release(&epochs);
    PyBuffer_Release(&samples);
    PyBuffer_Release(&out);
    PyBuffer_Release(&status);
    PyBuffer_Release(&stop);
    if (!workspace) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* load_bytes(transform, image, record, row, epoch, sample, out) -> status; an empty record stands for none */
static PyObject *load_bytes(PyObject *module, PyObject *args) {
    (void)module;
    struct transform transform;
    int status = 0;
    unsigned long long epoch, sample;
    unsigned row;
    Py_buffer image, record, out;
    if (!PyArg_ParseTuple(args, "O&y*y*IKKw*", as_transform, &transform, &image, &record, &row,
                          &epoch, &sample, &out)) {
        return NULL;
    }
    struct workspace *workspace = NULL;
    if (check(out.len == (Py_ssize_t)transform.size * transform.size * 3, "a buffer of another size") &&
        (workspace = take_workspace())) {
        Py_BEGIN_ALLOW_THREADS
        status = decode_view(workspace, image.buf, (size_t)image.len, record.len ? record.buf : NULL,
                             (size_t)record.len, row, &transform, epoch, sample, out.buf);
        Py_END_ALLOW_THREADS
        give_back(workspace);
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&record);
    PyBuffer_Release(&out);
    return workspace ? PyLong_FromLong(status) : NULL;
}

/* pixels(image, record, row, left, top, width, height) -> (status, RGB bytes): a rectangle as it is */
static PyObject *pixels(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer image, record;
    unsigned row;
    int left, top, width, height, status = 0;
    if (!PyArg_ParseTuple(args, "y*y*Iiiii", &image, &record, &row, &left, &top, &width, &height)) {
        return NULL;
    }
    PyObject *result = NULL;
    struct workspace *workspace = take_workspace();
    if (workspace) {
        struct frame frame;
        struct crop_index index;
        struct region region = {.workspace = workspace, .frame = &frame};
        status = read_header(image.buf, (size_t)image.len, &frame);
        if (!status && !(left >= 0 && top >= 0 && width > 0 && height > 0 && left <= frame.width - width &&
                         top <= frame.height - height)) {
            PyErr_SetString(PyExc_ValueError, "the rectangle lies outside of the image");
        } else if (status) {
            result = Py_BuildValue("(iy#)", status, "", (Py_ssize_t)0);
        } else {
            region.left = left;
            region.top = top;
            region.right = left + width;
            region.bottom = top + height;
            if (record.len) {
                status = open_record(record.buf, (size_t)record.len, row, image.buf, (size_t)image.len, &frame, &index)
                             ? decode_indexed(&region, image.buf, (size_t)image.len, &index)
                             : STATUS_STALE;
            } else {
                status = decode_plain(&region, image.buf, (size_t)image.len);
            }
            PyObject *bytes = PyBytes_FromStringAndSize(NULL, status ? 0 : (Py_ssize_t)width * height * 3);
            if (bytes && !status && !prepare_rows(&region, 4)) {
                PyErr_NoMemory();
                Py_DECREF(bytes);
                bytes = NULL;
            }
            if (bytes) {
                char *to = PyBytes_AsString(bytes);
                for (int y = 0; y < height && !status; y++) {
                    const uint8_t *pixel = pixel_row(&region, top + y, 0);
                    for (int x = 0; x < width; x++, to += 3, pixel += 4) {
                        memcpy(to, pixel, 3);
                    }
                }
                result = Py_BuildValue("(iN)", status, bytes);
            }
        }
        give_back(workspace);
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&record);
    return result;
}

/* index_image(image, row) -> record */
static PyObject *index_image(PyObject *module, PyObject *args) {
    (void)module;
    Py_buffer image;
    unsigned row;
    if (!PyArg_ParseTuple(args, "y*I", &image, &row)) {
        return NULL;
    }
    PyObject *result = NULL;
    struct workspace *workspace = NULL;
    if (check((uint64_t)image.len <= UINT32_MAX, "an image of more than 4 GB") && (workspace = take_workspace())) {
        const uint8_t *record;
        size_t size = 0;
        Py_BEGIN_ALLOW_THREADS
        record = build_record(workspace, image.buf, (size_t)image.len, row, &size);
        Py_END_ALLOW_THREADS
        result = record ? PyBytes_FromStringAndSize((const char *)record, (Py_ssize_t)size) : PyErr_NoMemory();
        give_back(workspace);
    }
    PyBuffer_Release(&image);
    return result;
}

/* draw(transform, width, height, epoch, sample) -> the view, for tests */
static PyObject *draw(PyObject *module, PyObject *args) {
    (void)module;
    struct transform transform;
    struct view view;
    int width, height;
    unsigned long long epoch, sample;
    if (!PyArg_ParseTuple(args, "O&iiKK", as_transform, &transform, &width, &height, &epoch,
                          &sample)) {
        return NULL;
    }
    if (!check(width > 0 && height > 0, "an image has pixels")) {
        return NULL;
    }
    draw_view(&transform, width, height, epoch, sample, &view);
    return Py_BuildValue("(iiiiiiiii)", view.left, view.top, view.width, view.height, view.scaled_width,
                         view.scaled_height, view.shift_left, view.shift_top, (int)view.flip);
}

/* variant([name]) -> the name of the kernels in use; a name chooses others, for tests */
static PyObject *variant(PyObject *module, PyObject *args) {
    (void)module;
    const char *name = NULL;
    if (!PyArg_ParseTuple(args, "|s", &name)) {
        return NULL;
    }
    if (name) {
        const struct kernels *best = best_kernels();
        if (strcmp(name, best->name) == 0) {
            chosen = best;
        } else if (strcmp(name, kernels_plain.name) == 0) {
            chosen = &kernels_plain;
        } else {
            PyErr_Format(PyExc_ValueError, "no kernels called %s for this processor", name);
            return NULL;
        }
    }
    return PyUnicode_FromString(chosen->name);
}

static PyMethodDef methods[] = {
    {"load_files", load_files, METH_VARARGS, NULL}, {"load_bytes", load_bytes, METH_VARARGS, NULL},
    {"pixels", pixels, METH_VARARGS, NULL},         {"index_image", index_image, METH_VARARGS, NULL},
    {"draw", draw, METH_VARARGS, NULL},             {"variant", variant, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "shards.jpeg._native", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) {
    PyObject *module = PyModule_Create(&definition);
    chosen = best_kernels();
    /* raised with every change of this interface, as in shards/jpeg/__init__.py */
    if (module && PyModule_AddIntConstant(module, "VERSION", 2)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
