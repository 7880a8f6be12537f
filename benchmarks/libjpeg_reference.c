/* What libjpeg-turbo itself takes: the references that benchmarks/loader.py measures loaders and kernels against.
 *
 * Three of them, each over a batch of images that lie in open files (read with pread, as the loaders read):
 *
 *   decode_whole   the whole image to RGB, thrown away: what every loader without a partial decode pays at least;
 *   entropy_only   the Huffman decoding alone, down to a row: libjpeg-turbo's floor, whatever is done with the pixels;
 *   decode_views   a loader's kernel at its best on this library: decode of the crop (jpeg_crop_scanline and
 *                  jpeg_skip_scanlines), antialiased triangle resize, mirrored or not, into a slot of a batch.
 *
 * Every call makes its own decompressor, so threads may call at once. The return value is -1, or the number of the
 * first image that cannot be decoded. Build: cc -O3 -shared -fPIC libjpeg_reference.c -o libjpeg_reference.so -ljpeg -lm
 */

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jpeglib.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROWS_AT_ONCE 16
#define MOST_OUTPUT 1024  /* pixels along a side of the output */
#define MOST_TAPS 128     /* input pixels that enter one output pixel, along one axis */
#define MARGIN 2          /* columns beside the crop that its chroma upsampling reads */
#define SLACK 256         /* bytes after each buffer: the vector loops read and write past its end */

/* An image in a file, and its view. The layout is IMAGE_DTYPE of loader_reference.py. */
typedef struct {
    uint64_t offset;
    uint32_t size;
    int32_t descriptor;
    int32_t left, top, width, height; /* the crop, in pixels of the image */
    int32_t flip;                     /* mirror left to right */
    int32_t padding;
} image_t;

/* For one axis: output pixel o is the sum of weight[o][i] * input[first[o] + i], i < count[o]; weights add to 2^14. */
typedef struct {
    int first[MOST_OUTPUT], count[MOST_OUTPUT];
    int16_t weight[MOST_OUTPUT][MOST_TAPS + 2];
} taps_t;

typedef struct {
    void *bytes;
    size_t room;
} buffer_t;

typedef struct {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf failed;
    buffer_t encoded, pixels, row;
    taps_t across, down;
} worker_t;

static void on_error(j_common_ptr jpeg) { longjmp(((worker_t *)jpeg->client_data)->failed, 1); }
static void on_message(j_common_ptr jpeg, int level) { (void)jpeg, (void)level; }
static void on_output(j_common_ptr jpeg) { (void)jpeg; }

static void close_worker(worker_t *worker) {
    jpeg_destroy_decompress(&worker->jpeg); /* as documented, also if it was not created whole */
    free(worker->encoded.bytes);
    free(worker->pixels.bytes);
    free(worker->row.bytes);
    free(worker);
}

/* Room for `size` bytes and SLACK more; the contents are not kept. Anything wrong longjmps, here and in what follows. */
static void reserve(worker_t *worker, buffer_t *buffer, size_t size) {
    if (size <= buffer->room) return;
    free(buffer->bytes);
    buffer->room = size + size / 2;
    buffer->bytes = malloc(buffer->room + SLACK);
    if (buffer->bytes) return;
    buffer->room = 0;
    longjmp(worker->failed, 1);
}

/* Read the bytes and the header. */
static void begin(worker_t *worker, const image_t *image) {
    reserve(worker, &worker->encoded, image->size);
    uint8_t *encoded = worker->encoded.bytes;
    if (pread(image->descriptor, encoded, image->size, (off_t)image->offset) != (ssize_t)image->size)
        longjmp(worker->failed, 1);
    jpeg_mem_src(&worker->jpeg, encoded, image->size);
    jpeg_read_header(&worker->jpeg, TRUE);
}

/* Read `rows` scanlines, `stride` bytes apart. */
static void read_rows(worker_t *worker, uint8_t *target, size_t stride, int rows) {
    JSAMPROW pointers[ROWS_AT_ONCE];
    for (int row = 0; row < rows;) {
        int most = rows - row < ROWS_AT_ONCE ? rows - row : ROWS_AT_ONCE;
        for (int i = 0; i < most; i++) pointers[i] = target + (size_t)(row + i) * stride;
        row += (int)jpeg_read_scanlines(&worker->jpeg, pointers, (JDIMENSION)most);
    }
}

static void whole(worker_t *worker, const image_t *image) {
    begin(worker, image);
    worker->jpeg.out_color_space = JCS_RGB;
    jpeg_start_decompress(&worker->jpeg);
    size_t stride = (size_t)worker->jpeg.output_width * 3;
    int rows = (int)worker->jpeg.output_height;
    reserve(worker, &worker->pixels, stride * (size_t)rows);
    read_rows(worker, worker->pixels.bytes, stride, rows);
}

/* Skipping scanlines of a sequential JPEG decodes the Huffman codes and throws the coefficients away. The last row is
 * read, since a skip to the very end decodes nothing: that costs the inverse transform of one row of blocks. */
static void entropy(worker_t *worker, const image_t *image, int to_crop) {
    begin(worker, image);
    jpeg_start_decompress(&worker->jpeg);
    size_t stride = (size_t)worker->jpeg.output_width * (size_t)worker->jpeg.output_components;
    int rows = to_crop ? image->top + image->height : (int)worker->jpeg.output_height;
    reserve(worker, &worker->pixels, stride);
    if (rows > 1) jpeg_skip_scanlines(&worker->jpeg, (JDIMENSION)(rows - 1));
    read_rows(worker, worker->pixels.bytes, stride, 1);
}

/* The taps of a triangle filter that grows with the reduction, as in Pillow: `length` input pixels from `offset` on
 * become `output` pixels; what lies beside them does not enter. */
static int make_taps(taps_t *taps, int offset, int length, int output) {
    double scale = (double)length / output, support = scale < 1 ? 1 : scale;
    if (output > MOST_OUTPUT || 2 * ceil(support) + 1 > MOST_TAPS) return 0;
    for (int o = 0; o < output; o++) {
        double centre = offset + (o + 0.5) * scale, weight[MOST_TAPS], sum = 0;
        int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
        if (first < offset) first = offset;
        if (last > offset + length) last = offset + length;
        int count = last > first ? last - first : 1, total = 0, largest = 0;
        for (int i = 0; i < count; i++) {
            double distance = fabs((first + i - centre + 0.5) / support);
            weight[i] = distance < 1 ? 1 - distance : 0;
            sum += weight[i];
        }
        int16_t *out = taps->weight[o];
        for (int i = 0; i < count; i++) {
            out[i] = (int16_t)lrint(weight[i] / sum * 16384);
            total += out[i];
            if (out[i] > out[largest]) largest = i;
        }
        out[largest] += (int16_t)(16384 - total);
        while (count > 1 && out[count - 1] == 0) count--;
        out[count] = 0; /* `across` takes two at a time */
        taps->first[o] = first;
        taps->count[o] = count;
    }
    return 1;
}

/* Both passes in one arithmetic, vector or not. Down: pixels times 2^7, weights to 2^15, each product rounded (pmulhrsw).
 * Across: 4 channels, weights to 2^14, one sum rounded at the end. */

static void down_portable(int16_t *out, const uint8_t *in, size_t stride, int count, const int16_t *weight, int length) {
    for (int i = 0; i < length; i++) {
        int sum = 0;
        for (int k = 0; k < count; k++) {
            int twice = weight[k] * 2 > 32767 ? 32767 : weight[k] * 2;
            sum += ((in[i + (size_t)k * stride] << 7) * twice + (1 << 14)) >> 15;
        }
        out[i] = (int16_t)sum;
    }
}

static void across_portable(uint8_t *out, const int16_t *in, const taps_t *taps, int output, int flip) {
    for (int o = 0; o < output; o++) {
        uint8_t *pixel = out + 3 * (flip ? output - 1 - o : o);
        for (int channel = 0; channel < 3; channel++) {
            int sum = 1 << 20;
            for (int i = 0; i < taps->count[o]; i++)
                sum += in[4 * (taps->first[o] + i) + channel] * taps->weight[o][i];
            sum >>= 21;
            pixel[channel] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
        }
    }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void down_avx2(int16_t *restrict out, const uint8_t *restrict in, size_t stride,
                                                      int count, const int16_t *weight, int length) {
    for (int i = 0; i < length; i += 16) {
        __m256i sum = _mm256_setzero_si256();
        const uint8_t *pixel = in + i;
        for (int k = 0; k < count; k++, pixel += stride) {
            int twice = weight[k] * 2 > 32767 ? 32767 : weight[k] * 2;
            __m256i value = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)pixel));
            value = _mm256_mulhrs_epi16(_mm256_slli_epi16(value, 7), _mm256_set1_epi16((int16_t)twice));
            sum = _mm256_add_epi16(sum, value);
        }
        _mm256_storeu_si256((__m256i *)(out + i), sum);
    }
}

__attribute__((target("avx2"))) static void across_avx2(uint8_t *restrict out, const int16_t *restrict in,
                                                        const taps_t *taps, int output, int flip) {
    /* two pixels of four channels, so that the two values of a channel stand side by side for pmaddwd */
    const __m128i pairs = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    for (int o = 0; o < output; o++) {
        const int16_t *pixel = in + (size_t)taps->first[o] * 4, *weight = taps->weight[o];
        __m128i sum = _mm_set1_epi32(1 << 20);
        for (int i = 0; i < taps->count[o]; i += 2) {
            int two;
            memcpy(&two, weight + i, sizeof two);
            __m128i values = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(pixel + 4 * i)), pairs);
            sum = _mm_add_epi32(sum, _mm_madd_epi16(values, _mm_set1_epi32(two)));
        }
        sum = _mm_srai_epi32(sum, 21);
        sum = _mm_packus_epi16(_mm_packs_epi32(sum, sum), sum);
        int rgb = _mm_cvtsi128_si32(sum);
        uint8_t *target = out + 3 * (flip ? output - 1 - o : o);
        target[0] = (uint8_t)rgb, target[1] = (uint8_t)(rgb >> 8), target[2] = (uint8_t)(rgb >> 16);
    }
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#else
#define down_avx2 down_portable
#define across_avx2 across_portable
static int has_avx2(void) { return 0; }
#endif

/* The crop of an image, decoded as RGBX, resized to `output` x `output` RGB. */
static void view(worker_t *worker, const image_t *image, int output, uint8_t *out) {
    j_decompress_ptr jpeg = &worker->jpeg;
    begin(worker, image);
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(jpeg);
    int width = (int)jpeg->output_width, right = image->left + image->width + MARGIN;
    int left = image->left > MARGIN ? image->left - MARGIN : 0;
    if (right > width) right = width;
    JDIMENSION first = (JDIMENSION)left, columns = (JDIMENSION)(right - left);
    /* the library moves `first` to the left, to a whole block */
    if (left > 0 || right < width) jpeg_crop_scanline(jpeg, &first, &columns);
    size_t stride = (size_t)columns * 4;
    reserve(worker, &worker->pixels, stride * (size_t)image->height);
    reserve(worker, &worker->row, stride * sizeof(int16_t));
    uint8_t *pixels = worker->pixels.bytes;
    int16_t *row = worker->row.bytes;
    if (!make_taps(&worker->across, image->left - (int)first, image->width, output) ||
        !make_taps(&worker->down, 0, image->height, output))
        longjmp(worker->failed, 1);
    if (image->top > 0) jpeg_skip_scanlines(jpeg, (JDIMENSION)image->top);
    read_rows(worker, pixels, stride, image->height);
    const taps_t *down = &worker->down;
    int vector = has_avx2();
    for (int o = 0; o < output; o++, out += (size_t)output * 3) {
        const uint8_t *in = pixels + (size_t)down->first[o] * stride;
        (vector ? down_avx2 : down_portable)(row, in, stride, down->count[o], down->weight[o], (int)stride);
        (vector ? across_avx2 : across_portable)(out, row, &worker->across, output, image->flip);
    }
}

enum work { WHOLE, ENTROPY, ENTROPY_TO_CROP, VIEW };

static int for_each(enum work work, const image_t *images, int count, int output, uint8_t *out) {
    worker_t *const worker = calloc(1, sizeof *worker);
    volatile int number = 0;
    if (!worker) return 0;
    worker->jpeg.err = jpeg_std_error(&worker->errors);
    worker->errors.error_exit = on_error;
    worker->errors.emit_message = on_message;
    worker->errors.output_message = on_output;
    worker->jpeg.client_data = worker; /* kept by jpeg_create_decompress, as is err */
    if (setjmp(worker->failed)) {
        close_worker(worker);
        return number;
    }
    jpeg_create_decompress(&worker->jpeg);
    for (; number < count; number++) {
        const image_t *image = images + number;
        if (work == WHOLE) whole(worker, image);
        else if (work == VIEW) view(worker, image, output, out + (size_t)number * output * output * 3);
        else entropy(worker, image, work == ENTROPY_TO_CROP);
        jpeg_abort_decompress(&worker->jpeg); /* the rows below are not needed */
    }
    close_worker(worker);
    return -1;
}

int decode_whole(const image_t *images, int count) { return for_each(WHOLE, images, count, 0, NULL); }

int entropy_only(const image_t *images, int count, int to_crop) {
    return for_each(to_crop ? ENTROPY_TO_CROP : ENTROPY, images, count, 0, NULL);
}

/* out: uint8 [count][output][output][3] */
int decode_views(const image_t *images, int count, int output, uint8_t *out) {
    return for_each(VIEW, images, count, output, out);
}

#define TEXT(token) #token
#define VERSION(token) TEXT(token)

const char *describe(void) {
    return has_avx2() ? "libjpeg-turbo " VERSION(LIBJPEG_TURBO_VERSION) ", resize with AVX2"
                      : "libjpeg-turbo " VERSION(LIBJPEG_TURBO_VERSION) ", portable resize";
}
