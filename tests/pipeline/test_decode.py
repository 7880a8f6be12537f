"""Every rung shows the same as Pillow, what one refuses goes to the next, and all of it is counted."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline import rungs
from pipeline.decode import DecodeError, make_decoder
from pipeline.rungs import RUNGS
from pipeline.schema import Transform
from pipeline.tally import FIELDS, Tally
from shards import jpeg
from shards.errors import UserError
from tests.conftest import require_rung

FASTER = RUNGS[:-1]
SMALL = {"size": 64, "evaluation_resize": 72}  # images of the tests are often smaller: enlarged, too
TRANSFORMS = {
    "paper": Transform(),
    "small": Transform(**SMALL),
    "large": Transform(size=320, evaluation_resize=352),
    "padded": Transform(**SMALL, crop="padded"),
    "whole": Transform(**SMALL, crop="none"),
}


@pytest.fixture(params=FASTER)
def rung(request: pytest.FixtureRequest) -> str:
    """Each rung above Pillow that is there."""
    return require_rung(request.param)


def photo(generator: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Smooth gradients, an edge, and noise."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    waves = [
        128 + 90 * np.sin(x / generator.uniform(5, 60) + generator.uniform(0, 6)) * np.cos(y / generator.uniform(5, 60))
        for _ in range(3)
    ]
    pixels = np.stack(waves, axis=-1) + generator.normal(0, generator.uniform(0, 25), (height, width, 1))
    pixels[(x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 4) ** 2] *= 0.5
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, kind: str) -> bytes:
    """A JPEG: of a chroma subsampling, "gray", "progressive" or "cmyk"; or another format that Pillow writes."""
    if kind[0] == "4":
        return simplejpeg.encode_jpeg(pixels, 85, "RGB", kind)
    content, image = io.BytesIO(), Image.fromarray(pixels)
    modes = {"gray": "L", "cmyk": "CMYK"}
    if kind in modes or kind == "progressive":
        image.convert(modes.get(kind, "RGB")).save(content, "JPEG", quality=85, progressive=kind == "progressive")
    else:
        image.save(content, kind)
    return content.getvalue()


def decode(rung: str, transform: Transform, data: bytes, epoch: int | None, sample: int) -> tuple[np.ndarray, Tally]:
    """The pixels, and who decoded them."""
    out, tally = np.zeros((transform.size, transform.size, 3), np.uint8), Tally()
    make_decoder(transform, 3, rung).image(data, out, epoch, sample, tally)
    return out, tally


def assert_alike(pixels: np.ndarray, expected: np.ndarray) -> None:
    differences = np.abs(pixels.astype(np.int16) - expected)
    assert differences.mean() < 0.5 and differences.max() <= 2


# ---------------------------------------------------------------- the same pixels


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", ["420", "422", "444", "440", "gray"])
def test_a_rung_shows_what_pillow_shows(rung: str, name: str, kind: str) -> None:
    transform = TRANSFORMS[name]
    generator = np.random.default_rng(sum(map(ord, name + kind)))
    for sample in range(6):
        width, height = generator.integers(17, 600, 2)
        data = encode(photo(generator, width, height), kind)
        for epoch in (None, 0, 1):
            pixels, tally = decode(rung, transform, data, epoch, sample)
            assert_alike(pixels, decode("pillow", transform, data, epoch, sample)[0])
            assert tally.figures() == {rung: 1}, "nothing was refused"


def test_both_mirrored_and_plain_views_were_compared() -> None:
    """A view that is mirrored by one rung alone would have been found above."""
    decoder = make_decoder(TRANSFORMS["small"], 3, "pillow")
    views = [
        decoder._decoders[0].augmentation.view(100, 100, epoch, sample)  # type: ignore[attr-defined]
        for epoch in (0, 1)
        for sample in range(6)
    ]
    assert {view.flip for view in views} == {True, False}


@pytest.mark.parametrize("padding", [0, 5, 64, 100])
def test_a_padded_view_may_lie_outside_of_the_image(rung: str, padding: int) -> None:
    transform = Transform(**SMALL, crop="padded", padding=padding)
    data = encode(photo(np.random.default_rng(0), 80, 60), "420")
    for sample in range(12):
        expected, _ = decode("pillow", transform, data, 0, sample)
        assert_alike(decode(rung, transform, data, 0, sample)[0], expected)


def test_the_size_is_that_of_the_slot(rung: str) -> None:
    data = encode(photo(np.random.default_rng(1), 200, 150), "420")
    for size in (32, 48):
        slots = [np.zeros((size, size, 3), np.uint8) for _ in range(2)]
        for choice, slot in zip((rung, "pillow"), slots, strict=True):
            make_decoder(TRANSFORMS["small"], 3, choice).image(data, slot, 1, 2, Tally())
        assert_alike(*slots)


def test_an_image_that_is_a_single_pixel(rung: str) -> None:
    data = encode(np.full((1, 1, 3), 77, np.uint8), "444")
    for epoch in (None, 0):
        expected, _ = decode("pillow", TRANSFORMS["small"], data, epoch, 0)
        assert_alike(decode(rung, TRANSFORMS["small"], data, epoch, 0)[0], expected)


# ---------------------------------------------------------------- down the ladder


@pytest.mark.parametrize("kind", ["progressive", "cmyk", "png", "webp"])
@pytest.mark.parametrize("epoch", [None, 0])
def test_what_a_rung_does_not_decode_goes_to_the_next(rung: str, kind: str, epoch: int | None) -> None:
    data = encode(photo(np.random.default_rng(4), 90, 70), kind)
    transform = TRANSFORMS["small"]
    pixels, tally = decode(rung, transform, data, epoch, 5)
    assert_alike(pixels, decode("pillow", transform, data, epoch, 5)[0])
    ladder = rungs.ladder(rung)
    takes = next(name for name in ladder if name == "pillow" or (name == "simplejpeg" and kind == "progressive"))
    refused = {f"{name}_unsupported": 1 for name in ladder[: ladder.index(takes)]}
    assert tally.figures() == {takes: 1, **refused}


def test_a_damaged_jpeg_is_tried_by_all_and_refused_by_pillow(rung: str) -> None:
    data = encode(photo(np.random.default_rng(4), 90, 70), "420")
    tally = Tally()
    with pytest.raises(DecodeError, match="cannot be decoded"):
        make_decoder(TRANSFORMS["small"], 3, rung).image(
            data[: len(data) // 2], np.zeros((64, 64, 3), np.uint8), 0, 0, tally
        )
    assert tally.figures() == {f"{name}_damaged": 1 for name in rungs.ladder(rung)[:-1]}


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff\xe0 only the start of a JPEG", b"\xff\xd8" * 50])
def test_what_is_no_image_is_a_decode_error_on_every_rung(rung: str, data: bytes) -> None:
    with pytest.raises(DecodeError, match="cannot be decoded"):
        decode(rung, TRANSFORMS["small"], data, None, 0)


@pytest.mark.parametrize("error", [IndexError("x"), EOFError("x"), KeyError("x"), MemoryError("x")])
def test_whatever_pillow_raises_is_a_decode_error_unless_memory_is_short(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_image(file: io.BytesIO) -> None:
        raise error

    monkeypatch.setattr(Image, "open", open_image)
    with pytest.raises(MemoryError if isinstance(error, MemoryError) else DecodeError):
        decode("pillow", TRANSFORMS["small"], b"x", None, 0)


def test_pillow_s_limit_of_pixels_is_the_ladder_s(rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(photo(np.random.default_rng(4), 90, 70), "progressive")  # which the C extension leaves to others
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode(rung, TRANSFORMS["small"], data, None, 0)


NO_THREADS = """
import sys, threading
import numpy as np, psutil, torch
from pipeline.decode import make_decoder
from pipeline.loader import decode_pool
from pipeline.schema import Transform
from pipeline.tally import Tally

torch.set_num_threads(4)
transform = Transform.model_validate_json(sys.argv[3])
decoder, data = make_decoder(transform, 0, sys.argv[1]), open(sys.argv[2], "rb").read()
ready, done = threading.Event(), threading.Event()

def decode():
    for epoch in (None, 0, 1, 2, 3):
        decoder.image(data, np.zeros((224, 224, 3), np.uint8), epoch, 0, Tally())
    ready.set()
    done.wait()

def others():
    return psutil.Process().num_threads() - threading.active_count()

with decode_pool(4) as pool:
    pool.submit(int).result()  # a pool of torch's that all threads share is made smaller
    before = others()
    for _ in range(3):
        ready.clear()
        pool.submit(decode)
        ready.wait()
        assert others() == before, "torch started a team for this thread"
    done.set()
assert torch.get_num_threads() == 4, "the threads that decode changed another's number"
"""


AUGMENTED = {
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "auto_augment": {"kind": "rand"},
    "random_erasing": {"probability": 1.0, "fill": "noise"},
}


@pytest.mark.parametrize(
    ("choice", "sections"),
    [
        ("simplejpeg", AUGMENTED),
        *(pytest.param(choice, {}, marks=pytest.mark.slow) for choice in RUNGS),
        *(pytest.param(choice, AUGMENTED, marks=pytest.mark.slow) for choice in ("native", "pillow")),
    ],
    ids=lambda value: value if isinstance(value, str) else "augmented" if value else "plain",
)
def test_a_decoder_starts_no_threads_of_its_own(choice: str, sections: dict, tmp_path: Path) -> None:
    require_rung(choice)
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(photo(np.random.default_rng(4), 700, 600), "420"))
    root = Path(__file__).resolve().parents[2]
    transform = Transform.model_validate(sections).model_dump_json()
    command = [sys.executable, "-c", NO_THREADS, choice, str(path), transform]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "4"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- the choice


def test_the_best_rung_is_taken_and_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "unavailable", lambda: None)
    assert rungs.ladder("auto") == ("native", "simplejpeg", "pillow")
    assert rungs.ladder("simplejpeg") == ("simplejpeg", "pillow")
    assert rungs.ladder("pillow") == ("pillow",)
    monkeypatch.setattr(jpeg, "unavailable", lambda: "was not built")
    assert rungs.ladder("auto") == ("simplejpeg", "pillow")
    assert rungs.better("simplejpeg") == {"native": "was not built"}
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert rungs.ladder("auto") == ("pillow",)
    assert list(rungs.better("pillow")) == ["native", "simplejpeg"]


def test_a_rung_that_is_asked_for_and_missing_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "unavailable", lambda: "was not built")
    with pytest.raises(UserError, match="the C extension was not built") as error:
        make_decoder(TRANSFORMS["paper"], 0, "native")
    assert "compiler" in str(error.value) and "./run.sh setup" in str(error.value) and '"auto"' in str(error.value)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UserError, match="simplejpeg is not installed") as error:
        make_decoder(TRANSFORMS["paper"], 0, "simplejpeg")
    assert "pip install simplejpeg" in str(error.value)


# ---------------------------------------------------------------- the counts


def test_counts_add_up_and_say_what_fell_through() -> None:
    total = Tally()
    for field, images in (("native", 90), ("indexed", 80), ("native_unsupported", 9), ("native_damaged", 1)):
        one = Tally()
        one.add(field, images)
        total += one
    total.add("simplejpeg", 4)
    total.add("pillow", 6)
    total.add("simplejpeg_unsupported", 6)
    assert total.images == 100
    assert total.fallen(RUNGS) == (
        "10 of 100 images not decoded by the C extension (9 unsupported and 1 damaged), "
        "but 4 by simplejpeg and 6 by Pillow"
    )
    assert list(total.figures()) == [field for field in FIELDS if total[field]]
    copied = Tally(total.counts.copy())
    assert copied.figures() == total.figures()


def test_nothing_is_said_of_a_run_in_which_nothing_fell_through() -> None:
    tally = Tally()
    tally.add("pillow", 3)
    assert tally.fallen(("pillow",)) == ""
    tally = Tally()
    tally.add("native", 3)
    assert tally.fallen(RUNGS) == ""
    assert Tally().fallen(RUNGS) == ""
