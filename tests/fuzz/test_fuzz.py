"""The JPEG decoder on damaged and hostile bytes: it says what it refuses, and a record never changes what is shown.

The fuzzer proper (docs/fuzzing.md) needs clang, and runs with the slow tests; here is a small one that runs everywhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shards import jpeg
from shards.jpeg import Status, Views
from tests.fuzz.make_corpus import images

HERE = Path(__file__).parent
INPUTS = 2000
SIZE = 12
KINDS = ("bit", "bit", "bit", "byte", "byte", "remove", "repeat", "marker", "end")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fuzzer_finds_nothing():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([HERE / "run.sh"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    if done.stdout.startswith("SKIP"):
        pytest.skip(done.stdout.strip().removeprefix("SKIP: "))
    print(done.stdout)
    assert "no finding" in done.stdout


def mutate(data: bytes, generator: np.random.Generator) -> bytes:
    """A few bytes changed, cut out, repeated or cut off: half the time behind the header, where pixels are."""
    changed = bytearray(data)
    scan = data.find(b"\xff\xda") + 14
    for _ in range(int(generator.integers(1, 4))):
        size = len(changed)
        if size < 4:
            break
        first = scan if generator.random() < 0.5 and 14 <= scan < size else 0
        at, length = int(generator.integers(first, size)), int(generator.integers(1, 9))
        kind = generator.choice(KINDS)
        if kind == "bit":
            changed[at] ^= 1 << int(generator.integers(8))
        elif kind == "byte":
            changed[at] = int(generator.choice([0, 1, 0x11, 0x22, 0x7F, 0x80, 0xD9, 0xFE, 0xFF]))
        elif kind == "remove":
            del changed[at : at + length]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length]
        elif kind == "marker":
            changed[at : at + 2] = bytes((0xFF, int(generator.choice([0x00, 0xD0, 0xD1, 0xD7, 0xD9, 0xFF]))))
        else:
            del changed[at:]
    return bytes(changed)


def decode(
    image: bytes, views: Views, number: int, record: bytes = b"", row: int = 0
) -> tuple[Status, np.ndarray | None]:
    out = np.full((SIZE, SIZE, 3), 77, np.uint8)
    status = jpeg.decode_bytes(image, out, views, epoch=number % 5, sample=number, record=record, row=row)
    return status, None if status < 0 else out


def assert_same(one: tuple[Status, np.ndarray | None], other: tuple[Status, np.ndarray | None]) -> None:
    """The same pixels, or the same refusal."""
    if one[1] is None or other[1] is None:
        assert one[0] == other[0]
    else:
        np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.skipif(jpeg.unavailable() is not None, reason=f"the C extension {jpeg.unavailable()}")
def test_damaged_images_and_records():
    """Whatever the bytes are, a record of theirs, of another image or a damaged one does not change the outcome."""
    generator = np.random.default_rng(3)
    best, portable = jpeg.describe().removeprefix("C extension, "), "portable C"
    seeds = [image for _, image in images()]
    records = [jpeg.index_image(image) for image in seeds]
    views = [
        Views(key=5, crop="resized", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), padding=0, flip=True),
        Views(key=6, crop="padded", scale=(1.0, 1.0), ratio=(1.0, 1.0), padding=3, flip=True),
        Views(key=7, crop="none", scale=(1.0, 1.0), ratio=(1.0, 1.0), padding=0, flip=False),
    ]
    seen: dict[Status, int] = {}
    for number in range(INPUTS):
        which, view = number % len(seeds), views[number % len(views)]
        image = mutate(seeds[which], generator)
        try:
            jpeg.choose_variant(portable)
            other_kernels = decode(image, view, number)
        finally:
            jpeg.choose_variant(best)
        plain = decode(image, view, number)
        assert plain[0] == other_kernels[0]
        assert_same(plain, other_kernels)
        assert plain[0] in (Status.PLAIN, Status.UNSUPPORTED, Status.DAMAGED, Status.TOO_LARGE)

        own = jpeg.index_image(image, row=number % 3)
        assert jpeg.index_image(image, row=number % 3) == own
        from_own = decode(image, view, number, own, row=number % 3)
        assert from_own[0] in (Status.INDEXED, plain[0])
        assert_same(plain, from_own)
        with_entries = len(own) > 32
        assert (from_own[0] == Status.INDEXED) == with_entries

        damaged = bytearray(own)
        damaged[int(generator.integers(len(own)))] ^= 1 << int(generator.integers(8))
        for record in (records[which], bytes(damaged), own[: len(own) // 2]):
            from_other = decode(image, view, number, record, row=number % 3)
            if image != seeds[which]:
                assert from_other[0] in (Status.STALE, plain[0])
            assert_same(plain, from_other)
        seen[from_own[0]] = seen.get(from_own[0], 0) + 1
    # that the mutations are neither harmless nor fatal
    often = (Status.INDEXED, Status.UNSUPPORTED, Status.DAMAGED)
    assert min(seen.get(status, 0) for status in often) > INPUTS // 20, seen
