"""Batches are a function of the requests alone: not of threads, ranks or timing; errors name the sample."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.augment import Augmentation
from pipeline.batch import Batch
from pipeline.decode import DecodeError, PillowDecoder
from pipeline.loader import Loader, Request, evaluation_requests, training_requests
from pipeline.order import Order
from pipeline.reader import ShardReader
from pipeline.schema import Transform
from shards.errors import UserError
from shards.index import load_split

TRANSFORM = Transform(size=24, evaluation_resize=28)


@pytest.fixture
def reader(tiny_shards):
    reader = ShardReader(load_split(tiny_shards, "train"))
    yield reader
    reader.close()


def epoch_pixels(reader: ShardReader, *, world_size: int, threads: int, prefetch: int) -> dict[int, bytes]:
    """The bytes of every sample of two epochs, by position in the stream."""
    order = Order(len(reader.split), seed=5)
    batch = Batch(train=16, micro=4, accumulation=4 // world_size, world_size=world_size)
    pixels: dict[int, bytes] = {}
    for rank in range(world_size):
        requests = training_requests(order, batch, rank, 0, 16)
        with Loader(reader, PillowDecoder(TRANSFORM, 5), requests, threads=threads, prefetch=prefetch) as loader:
            for index, micro_batch in enumerate(loader):
                update, micro_step = divmod(index, batch.accumulation)
                start = update * 16 + (rank * batch.accumulation + micro_step) * 4
                for offset in range(4):
                    pixels[start + offset] = micro_batch.images[offset].numpy().tobytes()
                    assert micro_batch.ids[offset] == order.ids(start + offset, start + offset + 1)[0]
                    assert micro_batch.labels[offset] == reader.split.samples[int(micro_batch.ids[offset])]["label"]
    return pixels


def test_pixels_are_the_same_for_any_threads_and_ranks(reader):
    expected = epoch_pixels(reader, world_size=1, threads=1, prefetch=1)
    assert sorted(expected) == list(range(256))
    for world_size, threads, prefetch in ((1, 8, 7), (2, 2, 1), (4, 3, 4)):
        assert epoch_pixels(reader, world_size=world_size, threads=threads, prefetch=prefetch) == expected


def test_an_image_looks_different_in_every_epoch(reader):
    ids, weights = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.float32)
    requests = [Request(ids, np.array([epoch]), weights, epoch, epoch) for epoch in range(6)]
    with Loader(reader, PillowDecoder(TRANSFORM, 5), requests, threads=2, prefetch=2) as loader:
        views = {batch.images.numpy().tobytes() for batch in loader}
    assert len(views) == 6


@pytest.mark.parametrize(("samples", "micro"), [(35, 8), (35, 35), (35, 64), (1, 4), (8, 4), (7, 1)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_covers_every_sample_once_in_one_shape(samples, micro, world_size):
    seen = []
    for rank in range(world_size):
        for request in evaluation_requests(samples, micro, rank, world_size):
            assert request.ids.shape == request.weights.shape == (micro,)
            assert request.ids.max() < samples
            seen += request.ids[request.weights == 1].tolist()
    assert sorted(seen) == list(range(samples))


def test_images_are_channels_last_and_unnormalised(reader):
    request = Request(np.arange(4), np.zeros(4, dtype=np.int64), np.ones(4, dtype=np.float32), 0, 3)
    with Loader(reader, PillowDecoder(TRANSFORM, 5), [request], threads=1, prefetch=1) as loader:
        batch = next(loader)
    assert batch.images.shape == (4, 3, 24, 24)
    assert batch.images.permute(0, 2, 3, 1).is_contiguous()
    assert batch.images.dtype.is_floating_point is False
    assert int(batch.images.max()) > 200


def test_a_corrupt_image_is_named_when_its_batch_is_asked_for_and_the_threads_end(tiny_shards, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(tiny_shards, root)
    split = load_split(root, "train")
    bad = 50
    record = split.samples[bad]
    path = split.shards[int(record["shard"])].path
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(bytes(int(record["size"])))
    reader = ShardReader(split)
    before = threading.active_count()
    requests = [
        Request(np.arange(s, s + 4), np.zeros(4, dtype=np.int64), np.ones(4, np.float32), s, s + 3) for s in (0, 48, 8)
    ]
    loader = Loader(reader, PillowDecoder(TRANSFORM, 5), requests, threads=4, prefetch=8)
    next(loader)
    with pytest.raises(UserError) as error:
        next(loader)
    assert path.name in str(error.value) and split.key(bad) in str(error.value) and "decoded" in str(error.value)
    began = time.monotonic()
    loader.close()
    reader.close()
    assert time.monotonic() - began < 2
    assert threading.active_count() == before


def test_a_shard_that_shrank_after_the_start_is_an_error_at_the_sample(tiny_shards, tmp_path):
    root = tmp_path / "shrunk"
    shutil.copytree(tiny_shards, root)
    split = load_split(root, "train")
    path = split.shards[0].path
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(int(split.samples[3]["offset"]) + 10)
    with pytest.raises(UserError, match="ends after 10 of") as error:
        ShardReader(split).read(3)
    assert "shards verify" in str(error.value)


def test_closing_in_the_middle_of_an_epoch_is_prompt(reader):
    requests = (Request(np.arange(8), np.full(8, e), np.ones(8, np.float32), e, e) for e in range(10_000))
    loader = Loader(reader, PillowDecoder(TRANSFORM, 5), requests, threads=4, prefetch=50)
    next(loader)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2


def encode(pixels: np.ndarray, kind: str, mode: str = "RGB") -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90°": must be ignored
    image.save(content, kind, **({"exif": exif} if kind == "JPEG" else {}))
    return content.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "P"), ("WEBP", "RGB")]
)
def test_every_kind_of_image_becomes_rgb_and_is_never_rotated(kind, mode):
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, 30:] = 255  # the right half is white
    out = np.zeros((24, 24, 3), dtype=np.uint8)
    PillowDecoder(Transform(size=24, evaluation_resize=24), 0).evaluate(encode(pixels, kind, mode), out)
    assert out[:, :8].max() < 40 and out[:, -8:].min() > 215


def test_the_evaluation_view_is_torchvision_s_resize_and_centre_crop():
    from torchvision.transforms.v2 import functional as F

    pixels = np.random.default_rng(0).integers(0, 256, size=(70, 50, 3), dtype=np.uint8)
    out = np.zeros((24, 24, 3), dtype=np.uint8)
    PillowDecoder(TRANSFORM, 0).evaluate(encode(pixels, "PNG"), out)
    expected = F.center_crop(F.resize(Image.fromarray(pixels), [28]), [24, 24])
    np.testing.assert_array_equal(out, np.asarray(expected))


def test_the_training_view_is_the_augmentation_s_box_resized_and_flipped():
    pixels = np.random.default_rng(0).integers(0, 256, size=(70, 50, 3), dtype=np.uint8)
    decoder, out = PillowDecoder(TRANSFORM, 9), np.zeros((24, 24, 3), dtype=np.uint8)
    flips = set()
    for sample in range(8):
        decoder.train(encode(pixels, "PNG"), out, epoch=2, sample=sample)
        view = Augmentation(TRANSFORM, 9).view(50, 70, 2, sample)
        box = (view.left, view.top, view.left + view.width, view.top + view.height)
        expected = np.asarray(Image.fromarray(pixels).crop(box).resize((24, 24), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(out, expected[:, ::-1] if view.flip else expected)
        flips.add(view.flip)
    assert flips == {True, False}


def test_the_padded_view_shifts_the_image_over_black():
    pixels = np.full((8, 8, 3), 200, dtype=np.uint8)
    transform = Transform(size=8, evaluation_resize=8, crop="padded", padding=2, flip=False)
    decoder, out = PillowDecoder(transform, 0), np.zeros((8, 8, 3), dtype=np.uint8)
    for sample in range(30):
        decoder.train(encode(pixels, "PNG"), out, epoch=0, sample=sample)
        view = Augmentation(transform, 0).view(8, 8, 0, sample)
        assert (out > 0).all(axis=2).sum() == (8 - abs(view.left)) * (8 - abs(view.top))


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0 only the start of a JPEG"])
def test_what_is_no_image_is_a_decode_error(data):
    with pytest.raises(DecodeError, match="cannot be decoded"):
        PillowDecoder(TRANSFORM, 0).evaluate(data, np.zeros((24, 24, 3), dtype=np.uint8))


WARNINGS = """
import io, sys, threading, warnings
import numpy as np
from PIL import Image, TiffImagePlugin
from pipeline.decode import PillowDecoder
from pipeline.schema import Transform

def decode(data):
    PillowDecoder(Transform(size=24, evaluation_resize=24), 0).evaluate(data, np.zeros((24, 24, 3), dtype=np.uint8))

filters = list(warnings.filters)
content = io.BytesIO()
# one tag whose text would lie beyond the end
exif = b"Exif\\0\\0II*\\0\\x08\\0\\0\\0" + b"\\x01\\0" + b"\\x0f\\x01\\x02\\0\\xff\\0\\0\\0\\xf0\\0\\0\\0" + bytes(4)
Image.new("RGB", (30, 30)).save(content, "JPEG", exif=exif)
threads = [threading.Thread(target=lambda: [decode(content.getvalue()) for _ in range(50)]) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert warnings.filters == filters, "the threads left the process's filters as they were"
print("after EXIF", file=sys.stderr)
Image.MAX_IMAGE_PIXELS = 600
decode(content.getvalue())
warnings.resetwarnings()
Image.open(io.BytesIO(content.getvalue()))
"""


def test_damaged_metadata_is_silent_in_every_thread_and_a_decompression_bomb_is_not():
    # in a process of its own, because pytest replaces the filters
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WARNINGS],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, _, after = done.stderr.partition("after EXIF")
    assert before == ""
    _, bomb, control = after.partition("DecompressionBombWarning: Image size (900 pixels)")
    assert bomb
    assert "EXIF" in control or "Truncated" in control or "Tag" in control, "without the filter there is a warning"
