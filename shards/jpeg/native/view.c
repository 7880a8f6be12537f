/* Drawing the view of a sample. Every line has its twin in pipeline/augment.py; tests compare them. */

#include "view.h"

#include <math.h>

#define RESIZED_CROP_ATTEMPTS 10

/* Philox 4x64-10 (Salmon et al. 2011), as numpy.random.Philox gives it out: the counter is raised before each block. */
struct philox {
    uint64_t key[2], counter[4], words[4];
    int used;
};

static void next_block(struct philox *philox) {
    if (++philox->counter[0] == 0 && ++philox->counter[1] == 0 && ++philox->counter[2] == 0) {
        ++philox->counter[3];
    }
    uint64_t *words = philox->words, key0 = philox->key[0], key1 = philox->key[1];
    for (int i = 0; i < 4; i++) {
        words[i] = philox->counter[i];
    }
    for (int round = 0; round < 10; round++) {
        unsigned __int128 first = (unsigned __int128)words[0] * 0xD2E7470EE14C6C93u;
        unsigned __int128 second = (unsigned __int128)words[2] * 0xCA5A826395121157u;
        words[0] = (uint64_t)(second >> 64) ^ words[1] ^ key0;
        words[1] = (uint64_t)second;
        words[2] = (uint64_t)(first >> 64) ^ words[3] ^ key1;
        words[3] = (uint64_t)first;
        key0 += 0x9E3779B97F4A7C15u;
        key1 += 0xBB67AE8584CAA73Bu;
    }
    philox->used = 0;
}

/* In [0, 1): the top 53 bits of a word. */
static double uniform(struct philox *philox) {
    if (philox->used == 4) {
        next_block(philox);
    }
    return (double)(philox->words[philox->used++] >> 11) * 0x1p-53;
}

/* In [0, high], both included. */
static int integer(struct philox *philox, int high) { return (int)(uniform(philox) * (high + 1)); }

/* torchvision's RandomResizedCrop.get_params. */
static void draw_resized_crop(const struct transform *transform, int width, int height, struct philox *philox,
                              struct view *view) {
    double low = transform->scale[0], high = transform->scale[1];
    const double *log_ratio = transform->log_ratio;
    for (int attempt = 0; attempt < RESIZED_CROP_ATTEMPTS; attempt++) {
        double area = (double)((int64_t)width * height) * (low + (high - low) * uniform(philox));
        double ratio = exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * uniform(philox));
        double crop_width = rint(sqrt(area * ratio)), crop_height = rint(sqrt(area / ratio));
        if (crop_width > 0 && crop_width <= width && crop_height > 0 && crop_height <= height) {
            view->width = (int)crop_width;
            view->height = (int)crop_height;
            view->top = integer(philox, height - view->height);
            view->left = integer(philox, width - view->width);
            return;
        }
    }
    view->width = width;
    view->height = height;
    double shape = (double)width / height;
    if (shape < transform->ratio[0]) {
        view->height = (int)rint(width / transform->ratio[0]);
    } else if (shape > transform->ratio[1]) {
        view->width = (int)rint(height * transform->ratio[1]);
    }
    view->left = (width - view->width) / 2;
    view->top = (height - view->height) / 2;
}

void draw_view(const struct transform *transform, int width, int height, uint64_t epoch, uint64_t sample,
               struct view *view) {
    int size = transform->size;
    *view = (struct view){.width = width, .height = height, .scaled_width = size, .scaled_height = size};
    if (transform->crop == CROP_EVALUATION) { /* torchvision's Resize and CenterCrop */
        int64_t resize = transform->evaluation_resize, shorter = width < height ? width : height;
        view->scaled_width = (int)(resize * width / shorter);
        view->scaled_height = (int)(resize * height / shorter);
        view->shift_left = (int)rint((view->scaled_width - size) / 2.0);
        view->shift_top = (int)rint((view->scaled_height - size) / 2.0);
        return;
    }
    struct philox philox = {
        .key = {transform->key[0], transform->key[1]}, .counter = {0, 0, epoch, sample}, .used = 4};
    view->flip = transform->flip && uniform(&philox) < 0.5;
    if (transform->crop == CROP_RESIZED) {
        draw_resized_crop(transform, width, height, &philox, view);
    } else if (transform->crop == CROP_PADDED) {
        view->shift_left = integer(&philox, 2 * transform->padding) - transform->padding;
        view->shift_top = integer(&philox, 2 * transform->padding) - transform->padding;
    }
}
