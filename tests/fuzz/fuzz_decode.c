/* libFuzzer target: everything of the decoder that sees bytes of a file, that is all but module.c.

   An input is CONTROL bytes that choose what to do, an encoded image, and a tail for the mode that needs one; input.h
   has the layout. Besides what the sanitizers find, these must hold, or the target aborts:

   - the portable kernels and the best ones of this processor give the same status and the same bytes;
   - a record built from the image is accepted, and pixels decoded with it are those of decoding from the top;
   - whatever was not decoded from a record has the pixels, and the status, of decoding from the top, and is called
     stale unless the record says that it has no entries;
   - a damaged record whose entries are a chain from the first on is refused, or gives the right pixels;
   - the weights of resampling sum to one, and reach for samples that there are;
   - decoding once more in the same workspaces, now full of other images' leftovers, changes nothing.

   The control bytes choose which of these are looked at: with all of them every time, there is time for a third of the
   inputs.

   Workspaces live on from input to input, as in a thread that decodes, and are freed every so often. */

#include "input.h"

#include "checksum.h"
#include "crop_index.h"
#include "decode.h"
#include "files.h"
#include "region.h"
#include "resample.h"

#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#define USUAL_SIZE 24           /* of an output: more than that is decoded only if the control bytes say so, … */
#define MOST_SIZE 64            /* … and more than that never: it takes too long */
#define USUAL_PIXELS (1 << 14)  /* of an image, likewise */
#define MOST_PIXELS (1 << 18)
#define FREE_EVERY 2000

#define REQUIRE(condition, what)                                                                                       \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, what);                                                  \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* What is decoded, from exact copies: one byte beyond any of them is noticed. */
struct job {
    uint8_t *image, *record; /* record: NULL without */
    size_t image_size, record_size;
    uint32_t row;
    struct transform transform;
    uint64_t epoch, sample;
    unsigned flags;
};

enum { PLAIN_KERNELS, BEST_KERNELS, VARIANTS };
static struct workspace workspaces[VARIANTS];
static int scratch_file = -1;
int reservations_left = -1; /* of watched_buffer.h */

static void free_workspaces(void) {
    for (int i = 0; i < VARIANTS; i++) {
        free_workspace(&workspaces[i]);
    }
}

static void set_up(void) {
    static unsigned inputs;
    if (inputs == 0) {
        char name[] = "/tmp/fuzz-decode-XXXXXX";
        init_workspace(&workspaces[PLAIN_KERNELS], &kernels_plain);
        init_workspace(&workspaces[BEST_KERNELS], best_kernels());
        scratch_file = mkstemp(name);
        REQUIRE(scratch_file >= 0 && unlink(name) == 0, "no temporary file");
        atexit(free_workspaces);
    } else if (inputs % FREE_EVERY == 0) {
        free_workspaces();
        init_workspace(&workspaces[PLAIN_KERNELS], &kernels_plain);
        init_workspace(&workspaces[BEST_KERNELS], best_kernels());
    }
    inputs++;
}

static uint8_t *copy_of(const uint8_t *bytes, size_t size) {
    uint8_t *copy = malloc(size ? size : 1);
    REQUIRE(copy, "no memory");
    if (size) {
        memcpy(copy, bytes, size);
    }
    return copy;
}

static bool is_status(int status) { return status >= STATUS_NO_MEMORY && status <= STATUS_STALE; }

/* Decode, and as the control bytes say also with the other kernels, and again; the status, and the pixels in `out`. */
static int decode(const struct job *job, bool with_record, uint8_t *out) {
    size_t bytes = (size_t)job->transform.size * (size_t)job->transform.size * 3;
    enum { FIRST, OTHER_KERNELS, AGAIN, PASSES };
    const bool is_wanted[PASSES] = {true, job->flags & FLAG_KERNELS, job->flags & FLAG_AGAIN};
    int first = job->flags & FLAG_PLAIN ? PLAIN_KERNELS : BEST_KERNELS, status = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        if (!is_wanted[pass]) {
            continue;
        }
        uint8_t *to = pass ? malloc(bytes) : out;
        memset(to, 0xA5 + pass, bytes);
        int got = decode_view(&workspaces[pass == OTHER_KERNELS ? !first : first], job->image, job->image_size,
                              with_record ? job->record : NULL, with_record ? job->record_size : 0, job->row,
                              &job->transform, job->epoch, job->sample, to);
        REQUIRE(is_status(got) && got != STATUS_UNREADABLE, "no status that decoding has");
        if (pass == 0) {
            status = got;
            continue;
        }
        REQUIRE(got == status,
                pass == AGAIN ? "decoding again has another status" : "kernels disagree about the status");
        REQUIRE(status < 0 || memcmp(out, to, bytes) == 0,
                pass == AGAIN ? "decoding again gives other pixels" : "kernels disagree about pixels");
        free(to);
    }
    return status;
}

/* The record of the job's image, in memory of its own. */
static void build(struct job *job) {
    size_t size, other_size;
    int first = job->flags & FLAG_PLAIN ? PLAIN_KERNELS : BEST_KERNELS;
    const uint8_t *record = build_record(&workspaces[first], job->image, job->image_size, job->row, &size);
    REQUIRE(record && size >= RECORD_HEADER, "no record");
    if (job->flags & FLAG_KERNELS) {
        const uint8_t *other = build_record(&workspaces[!first], job->image, job->image_size, job->row, &other_size);
        REQUIRE(other && size == other_size && memcmp(record, other, size) == 0, "kernels disagree about the record");
    }
    job->record = copy_of(record, size);
    job->record_size = size;
}

static void put32(uint8_t *bytes, uint64_t value) {
    for (int i = 0; i < 4; i++) {
        bytes[i] = (uint8_t)(value >> 8 * i);
    }
}

/* A record has a checksum in its first four bytes. */
static void seal(struct job *job) {
    if (job->record_size >= RECORD_HEADER) {
        put32(job->record, crc32_of(job->record + 4, job->record_size - 4));
    }
}

/* A record whose header fits the image, and whose entries are made of the tail's bytes, again and again: as they are,
   or positions that ascend by them. */
static void forge(struct job *job, const struct input *input) {
    struct frame frame;
    if (input->tail_size < 3 || read_header(job->image, job->image_size, &frame)) {
        job->record = copy_of(input->tail, input->tail_size);
        job->record_size = input->tail_size;
        seal(job);
        return;
    }
    unsigned mcus = input->tail[0] & 128 ? (unsigned)(input->tail[0] << 8 | input->tail[1]) : 1u + input->tail[0] % 16;
    size_t across = ((unsigned)frame.mcus_across + mcus - 1) / mcus, entries = across * (size_t)frame.mcus_down + 1;
    job->record_size = RECORD_HEADER + ENTRY_BYTES * entries;
    uint8_t *record = job->record = calloc(1, job->record_size);
    REQUIRE(record, "no memory");
    const uint32_t words[] = {0,
                              job->row,
                              (uint32_t)job->image_size,
                              (uint32_t)xxh64_of(job->image, job->image_size),
                              (uint32_t)frame.width | (uint32_t)frame.height << 16,
                              KIND_BASELINE | (uint32_t)frame.components << 8 | mcus << 16,
                              (uint32_t)frame.scan_offset,
                              (uint32_t)entries};
    for (size_t i = 0; i < RECORD_HEADER / 4; i++) {
        put32(record + 4 * i, words[i]);
    }
    bool ascends = input->tail[0] & 64;
    uint64_t position = 0;
    for (size_t i = RECORD_HEADER, from = 2; i < job->record_size; i++, from++) {
        if (from == input->tail_size) {
            from = 2;
        }
        record[i] = input->tail[from];
        if (ascends && (i - RECORD_HEADER) % ENTRY_BYTES == ENTRY_BYTES - 1) {
            uint8_t *entry = record + i + 1 - ENTRY_BYTES;
            position += input->tail[0] & 32 ? entry[0] : entry[0] % 32;
            for (int k = 0; k < 4; k++) { /* a position takes 28 bits */
                entry[k] = (uint8_t)((position >> 8 * k) | (k == 3 ? entry[k] & 0xF0 : 0));
            }
        }
    }
    seal(job);
}

/* Change the record as the tail says: entries mostly, whose positions and predictors are packed in 64 bits. */
static void damage(struct job *job, const struct input *input) {
    size_t entries = (job->record_size - RECORD_HEADER) / ENTRY_BYTES, size = job->record_size;
    size_t scan_offset = job->record[24] | (size_t)job->record[25] << 8;
    for (size_t at = 0; at + 6 <= input->tail_size; at += 6) {
        const uint8_t *order = input->tail + at;
        unsigned number = (unsigned)(order[1] << 8 | order[2]), value = (unsigned)(order[3] << 8 | order[4]);
        if (order[0] % 8 == 7 && order[5] % 4 == 0) { /* cut off, or longer, once the rest is done */
            size = order[5] & 4 ? number % job->record_size : job->record_size + 1 + value % 64;
            continue;
        }
        if (!entries || order[0] % 8 == 7) {
            job->record[4 + number % (job->record_size - 4)] = order[3];
            continue;
        }
        uint8_t *entry = job->record + RECORD_HEADER + ENTRY_BYTES * (number % entries);
        uint64_t packed = 0, position;
        for (int i = 7; i >= 0; i--) {
            packed = packed << 8 | entry[i];
        }
        position = packed & 0xFFFFFFF;
        switch (order[0] % 8) {
        case 0: /* forwards or back by some bits */
            position += (uint64_t)(int64_t)(int8_t)order[3];
            break;
        case 1:
            position += (uint64_t)(int64_t)(int16_t)value;
            break;
        case 2: /* close to the end of the file */
            position = (uint64_t)(job->image_size - scan_offset) * 8 - value % 1024;
            break;
        case 3:
            position = (uint64_t)value << (order[5] % 13);
            break;
        case 4: /* a predictor */
            packed ^= (uint64_t)(value & 0xFFF) << (28 + 12 * (order[5] % 3));
            break;
        case 5: /* what another entry has */
            memcpy(entry, job->record + RECORD_HEADER + ENTRY_BYTES * (value % entries), ENTRY_BYTES);
            continue;
        default:
            packed ^= (uint64_t)value << (order[5] % 49);
            position = packed & 0xFFFFFFF;
        }
        packed = (packed & ~(uint64_t)0xFFFFFFF) | (position & 0xFFFFFFF);
        for (int i = 0; i < 8; i++) {
            entry[i] = (uint8_t)(packed >> 8 * i);
        }
    }
    uint8_t *resized = calloc(1, size ? size : 1);
    memcpy(resized, job->record, size < job->record_size ? size : job->record_size);
    free(job->record);
    job->record = resized;
    job->record_size = size;
    seal(job);
}

/* Change the image after it was indexed, and make the record believe that it is still its image. */
static void change_image(struct job *job, const struct input *input) {
    size_t scan = job->record_size > RECORD_HEADER ? job->record[24] | (size_t)job->record[25] << 8 : 0;
    for (size_t at = 0; at + 4 <= input->tail_size && job->image_size; at += 4) {
        const uint8_t *order = input->tail + at;
        size_t place = (size_t)(order[1] << 8 | order[2]) % job->image_size;
        if (order[0] & 12 && place < scan && scan < job->image_size) { /* rather not in the header */
            place = scan + place % (job->image_size - scan);
        }
        switch (order[0] % 4) {
        case 0:
            job->image[place] = order[3];
            break;
        case 1:
            job->image[place] ^= (uint8_t)(1u << order[3] % 8);
            break;
        case 2: { /* cut off */
            uint8_t *shorter = copy_of(job->image, place);
            free(job->image);
            job->image = shorter;
            job->image_size = place;
            break;
        }
        default: /* towards the end, where the scan is */
            job->image[job->image_size - 1 - place % (job->image_size < 64 ? job->image_size : 64)] = order[3];
        }
    }
    put32(job->record + 8, job->image_size);
    put32(job->record + 12, xxh64_of(job->image, job->image_size));
    seal(job);
}

/* Once more, with memory that runs out on the way: the status must say so, or no memory was needed. */
static void starve(const struct job *job, const struct input *input, int status) {
    size_t bytes = (size_t)job->transform.size * (size_t)job->transform.size * 3, size;
    uint8_t *out = malloc(bytes);
    reservations_left = input->control[CONTROL_STARVE] % 24;
    int got = decode_view(&workspaces[BEST_KERNELS], job->image, job->image_size, job->record, job->record_size,
                          job->row, &job->transform, job->epoch, job->sample, out);
    REQUIRE(got == (reservations_left < 0 ? STATUS_NO_MEMORY : status), "a wrong status where memory ran out");
    reservations_left = input->control[CONTROL_STARVE] % 5;
    (void)build_record(&workspaces[BEST_KERNELS], job->image, job->image_size, job->row, &size);
    reservations_left = -1;
    free(out);
}

/* A file that is an index, and the image behind it. */
static bool write_file(const uint8_t *index, size_t index_size, const struct job *job) {
    return ftruncate(scratch_file, 0) == 0 && pwrite(scratch_file, index, index_size, 0) == (ssize_t)index_size &&
           pwrite(scratch_file, job->image, job->image_size, (off_t)index_size) == (ssize_t)job->image_size;
}

/* The same through files: an index that is the tail's bytes, a hostile one mostly; or one that holds the record. */
static void decode_files(const struct job *job, const struct input *input) {
    bool is_hostile = !(job->flags & FLAG_AGAIN);
    size_t directory = 64 + 16 * ((size_t)job->row + 1), record_size = 0, bytes = (size_t)job->transform.size;
    size_t index_size = is_hostile ? input->tail_size : directory + job->record_size;
    uint8_t *honest = calloc(1, directory + job->record_size);
    put32(honest + directory - 16, directory);
    put32(honest + directory - 8, job->record_size);
    memcpy(honest + directory, job->record, job->record_size);
    struct extent extent = {.offset = index_size,
                            .size = (uint32_t)job->image_size,
                            .descriptor = scratch_file,
                            .index_descriptor = scratch_file,
                            .row = job->row};
    REQUIRE(write_file(is_hostile ? input->tail : honest, index_size, job), "no temporary file");
    free(honest);
    struct workspace *workspace = &workspaces[BEST_KERNELS];
    REQUIRE(read_image(workspace, &extent) == 0, "the image cannot be read back");
    REQUIRE(memcmp(workspace->image.bytes, job->image, job->image_size) == 0, "the image was read wrongly");
    int status = read_record(workspace, &extent, &record_size);
    REQUIRE(status == 0 || status == STATUS_NO_MEMORY, "no status that reading has");
    if (!is_hostile) {
        REQUIRE(record_size == job->record_size && memcmp(workspace->record.bytes, job->record, record_size) == 0,
                "the record was read wrongly");
    }
    if (!status) {
        uint8_t *out = malloc(bytes * bytes * 3);
        status = decode_view(workspace, workspace->image.bytes, extent.size, workspace->record.bytes, record_size,
                             extent.row, &job->transform, job->epoch, job->sample, out);
        REQUIRE(is_status(status), "no status");
        free(out);
    }
    extent.size += 1 + input->control[CONTROL_STARVE]; /* more than there is */
    REQUIRE(read_image(workspace, &extent) == STATUS_UNREADABLE, "read more than the file has");
}

/* A rectangle of pixels as they are, from the record and from the top.

   Each run must end in the state that the next entry says. So where the first entry is right, and all runs are decoded,
   and no restart marker lets a state pass unseen, a damaged record gives the right pixels or is refused. */
static void compare_rectangle(const struct job *job, const struct input *input, bool is_own_record) {
    static const uint8_t whole[4] = {0, 0, 255, 255}, at_start[ENTRY_BYTES];
    struct frame frame;
    struct crop_index index;
    if (read_header(job->image, job->image_size, &frame)) {
        return;
    }
    bool is_chain = job->record_size > RECORD_HEADER + ENTRY_BYTES && !frame.restart_interval && frame.width <= 256 &&
                    frame.height <= 256 && memcmp(job->record + RECORD_HEADER, at_start, ENTRY_BYTES) == 0;
    const uint8_t *control = is_chain && !is_own_record ? whole : input->control + CONTROL_RECTANGLE;
    int left = control[0] * frame.width / 256, top = control[1] * frame.height / 256;
    int width = 1 + control[2] * (frame.width - left) / 256, height = 1 + control[3] * (frame.height - top) / 256;
    struct region region[VARIANTS];
    int status[VARIANTS];
    bool is_indexed = job->record && open_record(job->record, job->record_size, job->row, job->image, job->image_size,
                                                 &frame, &index);
    for (int i = 0; i < VARIANTS; i++) {
        region[i] = (struct region){.workspace = &workspaces[i],
                                    .frame = &frame,
                                    .left = left,
                                    .top = top,
                                    .right = left + width,
                                    .bottom = top + height};
        status[i] = i == BEST_KERNELS && is_indexed ? decode_indexed(&region[i], job->image, job->image_size, &index)
                                                    : decode_plain(&region[i], job->image, job->image_size);
    }
    if (is_own_record || !is_indexed) {
        REQUIRE(status[0] == status[1], "a rectangle has another status with its record");
    }
    if (status[0] || status[1] || !prepare_rows(&region[0], 4) || !prepare_rows(&region[1], 4)) {
        return;
    }
    for (int y = top; y < top + height; y++) {
        const uint8_t *one = pixel_row(&region[0], y, y & 1), *other = pixel_row(&region[1], y, y & 1);
        if (is_own_record || !is_indexed || is_chain) {
            REQUIRE(memcmp(one, other, 4 * (size_t)width) == 0, "a rectangle has other pixels with its record");
        }
    }
}

/* The weights across that decode_view asks for: a wrong sum shows in no comparison, for all have the same. */
static void check_weights(const struct job *job, const struct view *view) {
    static struct buffer weights, starts;
    struct filter filter;
    int low, high, first = job->transform.crop == CROP_PADDED ? 0 : view->shift_left;
    REQUIRE(make_filter(view->width, view->scaled_width, first, job->transform.size, view->flip, &weights, &starts,
                        &filter, &low, &high),
            "no memory");
    REQUIRE(low >= 0 && low < high && high <= view->width, "samples that there are not");
    for (int i = 0; i < filter.outputs; i++) {
        int sum = 0;
        for (int k = 0; k < filter.taps; k++) {
            int weight = filter.weights[i * filter.taps + k];
            sum += weight;
            REQUIRE(!weight || filter.start[i] + k < high - low, "a weight for a sample that there is not");
        }
        REQUIRE(filter.start[i] >= 0 && sum == 1 << filter.precision, "weights of another sum");
    }
    release(&weights);
    release(&starts);
}

static void choose_transform(const uint8_t *control, struct job *job) {
    static const double scales[][2] = {{0.08, 1}, {0.01, 0.02}, {0.35, 0.5}, {1, 1}, {1e-6, 1e-5}};
    static const double ratios[][2] = {{0.75, 4.0 / 3}, {1, 1}, {0.01, 100}, {3, 4}, {0.2, 0.4}};
    struct transform *transform = &job->transform;
    job->flags = control[CONTROL_FLAGS];
    transform->size = 1 + control[CONTROL_SIZE] % (job->flags & FLAG_LARGE ? MOST_SIZE : USUAL_SIZE);
    transform->crop = (enum crop)(control[CONTROL_CROP] & 3);
    transform->flip = control[CONTROL_CROP] & 4;
    transform->key[0] = 0x9E3779B97F4A7C15u * control[CONTROL_KEY];
    transform->key[1] = control[CONTROL_KEY] / 16;
    memcpy(transform->scale, scales[control[CONTROL_SCALE] % 5], sizeof transform->scale);
    memcpy(transform->ratio, ratios[control[CONTROL_SCALE] / 5 % 5], sizeof transform->ratio);
    for (int i = 0; i < 2; i++) {
        transform->log_ratio[i] = log(transform->ratio[i]);
    }
    transform->padding = control[CONTROL_PADDING] % 100;
    transform->evaluation_resize = transform->size + control[CONTROL_RESIZE];
    job->epoch = control[CONTROL_KEY] & 3;
    job->sample = control[CONTROL_KEY] >> 2;
    job->row = control[CONTROL_ROW] % 4;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct input input;
    struct frame frame;
    struct job job = {0};
    if (!split_input(data, size, &input)) {
        return 0;
    }
    set_up();
    choose_transform(input.control, &job);
    job.image = copy_of(input.image, input.image_size);
    job.image_size = input.image_size;
    int status = read_header(job.image, job.image_size, &frame);
    int most = job.flags & FLAG_LARGE ? MOST_PIXELS : USUAL_PIXELS;
    bool is_empty = false; /* the view: extreme ratios of an image of one row or column */
    if (!status) {
        struct view view;
        draw_view(&job.transform, frame.width, frame.height, job.epoch, job.sample, &view);
        is_empty = view.width < 1 || view.height < 1;
        if (job.flags & FLAG_RECTANGLE && !is_empty) {
            check_weights(&job, &view);
            view.width = 1 + (int)(xxh64_of(job.image, job.image_size) % 4096); /* wider ones than there is time for */
            check_weights(&job, &view);
        }
        if ((int64_t)frame.mcu_width * frame.mcus_across * frame.mcu_height * frame.mcus_down > most) {
            free(job.image);
            return 0;
        }
    }
    enum mode mode = (enum mode)(input.control[CONTROL_MODE] % MODES);
    if (mode != MODE_PLAIN && mode != MODE_FORGED) {
        build(&job);
    }
    if (mode == MODE_FORGED) {
        forge(&job, &input);
    } else if (mode == MODE_DAMAGED) {
        damage(&job, &input);
    } else if (mode == MODE_CHANGED) {
        change_image(&job, &input);
    } else if (mode == MODE_FILES) {
        decode_files(&job, &input);
    }
    size_t bytes = (size_t)job.transform.size * (size_t)job.transform.size * 3;
    uint8_t *plain = malloc(bytes), *out = malloc(bytes);
    status = decode(&job, false, plain);
    REQUIRE(status == STATUS_PLAIN || status < 0, "decoded from a record that it was not given");
    bool is_own = mode == MODE_OWN || mode == MODE_FILES;
    if (job.record) {
        int with_record = decode(&job, true, out);
        if (is_own) {
            bool has_entries = job.record_size > RECORD_HEADER;
            REQUIRE(!has_entries || is_empty || (with_record == STATUS_INDEXED && status == STATUS_PLAIN),
                    "an image's own record is not used");
            REQUIRE((has_entries && !is_empty) || with_record == status, "a record without entries changes the status");
        }
        if (with_record != STATUS_INDEXED) {
            REQUIRE(with_record == status || (with_record == STATUS_STALE && status == STATUS_PLAIN),
                    "a record that is not used changes the status");
            REQUIRE(with_record != STATUS_PLAIN || is_record_without_entries(job.record, job.record_size, job.row,
                                                                             job.image, job.image_size),
                    "a record that is not used is not called stale");
        }
        if (with_record >= 0 && (is_own || with_record != STATUS_INDEXED)) {
            REQUIRE(memcmp(plain, out, bytes) == 0, "other pixels with a record");
        }
        if (job.flags & FLAG_STARVE) {
            starve(&job, &input, with_record);
        }
        if (job.flags & FLAG_OTHER_ROW) {
            job.row++;
            bool is_its_own = job.record_size >= RECORD_HEADER && read32(job.record + 4) == job.row; /* by damage */
            with_record = decode(&job, true, out);
            REQUIRE(is_its_own || with_record < 0 || with_record == STATUS_STALE,
                    "the record of another row was used");
            job.row--;
        }
    }
    if (job.flags & FLAG_RECTANGLE) {
        compare_rectangle(&job, &input, is_own && job.record && job.record_size > RECORD_HEADER);
    }
    free(plain);
    free(out);
    free(job.image);
    free(job.record);
    return 0;
}
