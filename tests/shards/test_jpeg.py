"""The C decoder gives libjpeg-turbo's pixels, byte for byte, from anywhere in the file; what it refuses, it says."""

from __future__ import annotations

import io
import itertools
import os
import struct
import threading

import numpy as np
import pytest
from PIL import Image

from shards import jpeg
from shards.jpeg import EXTENT_DTYPE, Status, Views
from tests.shards.jpeg_writer import FLAT, STEEP, write_jpeg

pytestmark = pytest.mark.skipif(jpeg.unavailable() is not None, reason=f"the C extension {jpeg.unavailable()}")

FACTORS = (1, 2, 4)
SAMPLINGS = [
    ((1, 1),),
    ((2, 2),),  # one component is coded block by block whatever its factors
    *(((h, v), (1, 1), (1, 1)) for h, v in itertools.product(FACTORS, FACTORS) if h * v + 2 <= 10),
    ((2, 2), (2, 1), (1, 2)),
    ((2, 1), (1, 1), (2, 1)),
    ((1, 1), (2, 2), (2, 2)),
    ((1, 2), (1, 1), (1, 2)),
]
SIZES = [(1, 1), (7, 9), (8, 8), (16, 16), (17, 33), (50, 3), (3, 50), (64, 40), (131, 97)]


@pytest.fixture(params=["best", "portable C"])
def variant(request):
    """Every test with the best kernels for this processor, and with the portable ones."""
    best = jpeg.describe().removeprefix("C extension, ")
    jpeg.choose_variant(best if request.param == "best" else request.param)
    yield request.param
    jpeg.choose_variant(best)


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rectangles(width: int, height: int, generator: np.random.Generator, count: int) -> list[tuple[int, int, int, int]]:
    """Left, top, width, height: the whole image, its corners, and some at random."""
    found = [(0, 0, width, height), (width - 1, height - 1, 1, 1), (0, 0, 1, 1), (width // 2, 0, 1, height)]
    for _ in range(count):
        left, top = int(generator.integers(width)), int(generator.integers(height))
        found.append(
            (left, top, int(generator.integers(1, width - left + 1)), int(generator.integers(1, height - top + 1)))
        )
    return found


def assert_same_pixels(data: bytes, generator: np.random.Generator, count: int = 6) -> None:
    """Rectangles with and without index against Pillow's pixels."""
    expected = pillow(data)
    record = jpeg.index_image(data, 3)
    assert len(record) > 32, "must have entries"
    for left, top, width, height in rectangles(expected.shape[1], expected.shape[0], generator, count):
        for given in (b"", record):
            status, pixels = jpeg.decode_rectangle(data, left, top, width, height, given, 3)
            assert status is (Status.INDEXED if given else Status.PLAIN)
            np.testing.assert_array_equal(pixels, expected[top : top + height, left : left + width])


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_every_sampling_factor_and_odd_size(variant, sampling):
    generator = np.random.default_rng(1)
    for width, height in SIZES:
        assert_same_pixels(write_jpeg(width, height, sampling, generator), generator)


@pytest.mark.parametrize("interval", [1, 2, 3, 5, 7, 40, 1000])
@pytest.mark.parametrize("sampling", [((1, 1),), ((1, 1),) * 3, ((2, 2), (1, 1), (1, 1))], ids=str)
def test_restart_markers_anywhere(variant, interval, sampling):
    generator = np.random.default_rng(2)
    for width, height in ((131, 97), (200, 20), (16, 90)):
        assert_same_pixels(write_jpeg(width, height, sampling, generator, restart_interval=interval), generator)


@pytest.mark.parametrize("lengths", [FLAT, STEEP], ids=["flat", "steep"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.6, 1.0])
def test_short_and_long_codes_sparse_and_full_blocks(variant, lengths, density):
    generator = np.random.default_rng(3)
    data = write_jpeg(150, 70, ((2, 1), (1, 1), (1, 1)), generator, lengths=lengths, density=density)
    assert_same_pixels(data, generator)


@pytest.mark.parametrize("quality", [5, 50, 90, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_blocks": 3}], ids=str)
def test_what_pillow_writes(variant, quality, subsampling, options):
    generator = np.random.default_rng(4)
    y, x = np.mgrid[0:121, 0:233]
    waves = np.stack([np.sin(x / 17) + np.cos(y / 11), np.sin((x + y) / 23), np.cos(x / 5)], -1)
    photo = Image.fromarray(np.clip(128 + 60 * waves + generator.normal(0, 12, waves.shape), 0, 255).astype(np.uint8))
    for mode in ("RGB", "L"):
        content = io.BytesIO()
        more = {} if mode == "L" else {"subsampling": subsampling}
        photo.convert(mode).save(content, "JPEG", quality=quality, **more, **options)
        assert_same_pixels(content.getvalue(), generator)


def test_coefficients_far_out_of_range_are_the_same_with_all_kernels():
    generator = np.random.default_rng(5)
    best = jpeg.describe().removeprefix("C extension, ")
    for quantization in (16, 100, 255):
        data = write_jpeg(90, 50, ((2, 2), (1, 1), (1, 1)), generator, quantization=quantization, density=1.0)
        found = []
        for name in (best, "portable C"):
            jpeg.choose_variant(name)
            found.append(jpeg.decode_rectangle(data, 0, 0, 90, 50)[1])
        jpeg.choose_variant(best)
        np.testing.assert_array_equal(*found)


# ---------------------------------------------------------------- views


def views(crop: str = "resized", **changes) -> Views:
    values = {"key": 12345 << 70 | 99, "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "padding": 4, "flip": True}
    return Views(crop=crop, **{**values, **changes})


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_draws_are_those_of_the_augmentation(crop):
    from pipeline.augment import Augmentation
    from pipeline.schema import Transform

    generator = np.random.default_rng(6)
    kinds = [{}] if crop != "resized" else [{}, {"scale": (0.9, 1.0), "ratio": (0.99, 1.0)}, {"ratio": (1.5, 2.0)}]
    for changes, seed, flip in itertools.product(kinds, (0, 7, 2**63 - 1), (True, False)):
        transform = Transform(size=24, evaluation_resize=24, crop=crop, flip=flip, **changes)
        augmentation = Augmentation(transform, seed)
        drawn = Views(augmentation.key, crop, transform.scale, transform.ratio, transform.padding, transform.flip)
        for _ in range(400):
            width, height = (int(generator.integers(1, 10 ** int(generator.integers(1, 5)))) for _ in range(2))
            epoch, sample = int(generator.integers(10**6)), int(generator.integers(10**12))
            view = augmentation.view(width, height, epoch, sample)
            found = jpeg.draw_view(drawn, 24, width, height, epoch, sample)
            place = found[6:8] if crop == "padded" else found[:2]
            assert (*place, bool(found[8])) == (view.left, view.top, view.flip)
            if crop != "padded":
                assert found[2:4] == (view.width, view.height)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (40, 31), (24, 24), (300, 25), (9, 200), (1, 1)])
@pytest.mark.parametrize("resize", [24, 27, 64])
def test_evaluation_is_the_middle_of_the_scaled_image(variant, width, height, resize):
    from torchvision.transforms.v2 import functional as F

    data = write_jpeg(width, height, ((2, 2), (1, 1), (1, 1)), np.random.default_rng(7), density=0.03)
    image = F.center_crop(F.resize(Image.open(io.BytesIO(data)), [resize], antialias=True), [24, 24])
    out = np.zeros((24, 24, 3), np.uint8)
    for record, wanted in ((b"", Status.PLAIN), (jpeg.index_image(data), Status.INDEXED)):
        assert jpeg.evaluate_bytes(data, out, resize, record) is wanted
        difference = np.abs(out.astype(int) - np.asarray(image))
        assert difference.max() <= 1


@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_small_and_odd_output_sizes_and_neighbours_stay_untouched(variant, size):
    data = write_jpeg(100, 60, ((1, 1),) * 3, np.random.default_rng(8))
    slab = np.full((3, size, size, 3), 77, np.uint8)
    for sample in range(20):
        for crop in ("resized", "padded", "none"):
            assert jpeg.decode_bytes(data, slab[1], views(crop), 0, sample) is Status.PLAIN
    assert (slab[0] == 77).all() and (slab[2] == 77).all()


# ---------------------------------------------------------------- files, refusals


def test_files_are_read_in_threads_and_every_image_has_a_status(tmp_path):
    generator = np.random.default_rng(9)
    images = [write_jpeg(60 + i, 50, ((2, 2), (1, 1), (1, 1)), generator) for i in range(6)]
    images[2] = b"no image"
    images[4] = images[4][: len(images[4]) // 2]
    path = tmp_path / "images"
    path.write_bytes(b"".join(images))
    extents = np.zeros(len(images) + 1, EXTENT_DTYPE)
    extents["index_descriptor"] = -1
    extents["size"] = [*map(len, images), 10]
    extents["offset"] = np.concatenate([[0], np.cumsum(extents["size"][:-1])])  # the last lies beyond the end
    descriptor = os.open(path, os.O_RDONLY)
    extents["descriptor"] = descriptor
    samples = np.arange(len(extents), dtype=np.int64)
    expected = [np.zeros((16, 16, 3), np.uint8) for _ in images]
    wanted = [
        jpeg.decode_bytes(image, out, views(), 5, i)
        for i, (image, out) in enumerate(zip(images, expected, strict=True))
    ]
    assert [int(status) for status in wanted] == [1, 1, -1, 1, -2, 1]

    def work() -> None:
        for _ in range(20):
            out = np.zeros((len(extents), 16, 16, 3), np.uint8)
            status = np.full(len(extents), 9, np.int32)
            jpeg.decode_files(extents, out, status, views(), np.full(len(extents), 5, np.int64), samples)
            assert status.tolist() == [*map(int, wanted), Status.UNREADABLE]
            for i in (0, 1, 3, 5):
                assert np.array_equal(out[i], expected[i])
            done.append(1)

    done: list[int] = []
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    assert len(done) == 120


def _encode(kind: str, mode: str = "RGB", **options) -> bytes:
    content = io.BytesIO()
    Image.new(mode, (40, 30)).save(content, kind, **options)
    return content.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        _encode("PNG"),
        _encode("JPEG", progressive=True),
        _encode("JPEG", "CMYK"),
        _encode("JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),  # 12 bits
    ],
    ids=["empty", "cut", "png", "progressive", "cmyk", "12 bits"],
)
def test_what_is_no_baseline_jpeg_is_left_to_others(data):
    out = np.zeros((8, 8, 3), np.uint8)
    assert jpeg.decode_bytes(data, out, views(), 0, 0) is Status.UNSUPPORTED
    record = jpeg.index_image(data)
    assert len(record) == 32 and record[20] == 0


def test_rgb_colour_is_left_to_others():
    data = write_jpeg(20, 20, ((1, 1),) * 3, np.random.default_rng(10))
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    without_jfif = data[:2] + adobe + data[20:]
    assert Image.open(io.BytesIO(without_jfif)).getbands() == ("R", "G", "B")
    out = np.zeros((8, 8, 3), np.uint8)
    assert jpeg.decode_bytes(without_jfif, out, views(), 0, 0) is Status.UNSUPPORTED


def test_an_image_that_may_be_meant_to_exhaust_the_memory_is_left_to_pillow():
    data = bytearray(write_jpeg(20, 20, ((1, 1),), np.random.default_rng(11)))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 65500, 65500)
    out = np.zeros((8, 8, 3), np.uint8)
    assert jpeg.decode_bytes(bytes(data), out, views(), 0, 0) is Status.TOO_LARGE


def test_a_scan_cut_anywhere_is_damaged_or_whole():
    data = write_jpeg(90, 60, ((2, 2), (1, 1), (1, 1)), np.random.default_rng(12), restart_interval=4)
    expected = pillow(data)
    for cut in range(len(data)):
        _, pixels = jpeg.decode_rectangle(data[:cut], 0, 0, 90, 60)
        assert pixels is None or (cut >= len(data) - 1 and np.array_equal(pixels, expected)), cut
        record = jpeg.index_image(data[:cut])
        assert len(record) == 32 or cut >= len(data) - 1


def test_fill_bytes_before_restart_markers_are_passed():
    data = write_jpeg(131, 97, ((2, 2), (1, 1), (1, 1)), np.random.default_rng(13), restart_interval=5)
    start = data.index(b"\xff\xda")
    for number in range(0xD0, 0xD8):
        data = data[:start] + data[start:].replace(bytes((0xFF, number)), bytes((0xFF, 0xFF, 0xFF, number)))
    assert_same_pixels(data, np.random.default_rng(14))


@pytest.mark.parametrize("position", ["before the frame", "between tables"])
def test_the_last_definition_of_a_table_counts_and_other_segments_are_passed(position):
    data = write_jpeg(60, 50, ((1, 1),) * 3, np.random.default_rng(15))
    table = data.index(b"\xff\xdb")
    wrong = b"\xff\xdb\x00\x43\x00" + bytes(range(1, 65))
    comment = b"\xff\xfe\x00\x05odd" + b"\xff\xe5\x00\x02" + b"\xff"  # a fill byte at the end
    place = table if position == "between tables" else 2
    assert_same_pixels(data[:place] + wrong + comment + data[place:], np.random.default_rng(16))


def test_a_call_ends_when_it_is_told_to(tmp_path):
    data = write_jpeg(60, 50, ((1, 1),) * 3, np.random.default_rng(17))
    path = tmp_path / "image"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    extents = np.zeros(3, EXTENT_DTYPE)
    extents["size"], extents["descriptor"], extents["index_descriptor"] = len(data), descriptor, -1
    out, status, ids = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int32), np.arange(3)
    for stop, wanted in (
        (None, Status.PLAIN),
        (np.zeros(1, np.uint8), Status.PLAIN),
        (np.ones(1, np.uint8), Status.STOPPED),
    ):
        jpeg.decode_files(extents, out, status, views(), ids, ids, stop)
        assert status.tolist() == [wanted] * 3
        jpeg.evaluate_files(extents, out, status, 9, stop)
        assert status.tolist() == [wanted] * 3
    os.close(descriptor)


@pytest.mark.parametrize("wrong", ["status", "epochs", "samples", "extents"])
def test_arrays_of_the_wrong_type_are_refused(wrong):
    arrays = {
        "extents": np.zeros(1, EXTENT_DTYPE),
        "status": np.zeros(1, np.int32),
        "epochs": np.zeros(1, np.int64),
        "samples": np.zeros(1, np.int64),
    }
    arrays[wrong] = np.zeros(1, np.float32)
    with pytest.raises(TypeError, match="float32"):
        jpeg.decode_files(out=np.zeros((1, 8, 8, 3), np.uint8), views=views(), **arrays)


def test_buffers_of_the_wrong_size_are_refused():
    with pytest.raises(ValueError):
        jpeg.decode_files(
            np.zeros(2, EXTENT_DTYPE),
            np.zeros((2, 8, 8, 3), np.uint8),
            np.zeros(1, np.int32),
            views(),
            np.zeros(2, np.int64),
            np.zeros(2, np.int64),
        )
