"""The last rung: everything that is an image becomes RGB, cut as the view says; the rest is an error."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.augment import Augmentation
from pipeline.decode_pillow import DecodeError, PillowDecoder
from pipeline.schema import Transform

TRANSFORM = Transform(size=24, evaluation_resize=28)


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
from pipeline.decode_pillow import PillowDecoder
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
