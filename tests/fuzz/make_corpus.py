"""Seeds for the fuzzer: small images of every kind, made here, with the control bytes of input.h in front.

    python tests/fuzz/make_corpus.py OUT

Without arguments to choose: the same files every time, for one version of Pillow. Photographs are of no use here: all
that a decoder can do happens within a few blocks, and small inputs run thousands of times a second.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CONTROL = 16
"""Bytes before the image."""
MODES = 6
FLAGS = 127
"""Everything is looked at."""
SIZES = [(1, 1), (1, 40), (40, 1), (7, 9), (16, 16), (17, 33), (64, 48), (100, 75), (3, 100)]


def pixels(kind: str, width: int, height: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 [height, width, 3]: ``noise``, a ``smooth`` gradient, or ``flat``."""
    if kind == "noise":
        return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "flat":
        return np.full((height, width, 3), generator.integers(0, 256, 3), dtype=np.uint8)
    down, across = np.mgrid[0:height, 0:width]
    planes = [128 + 120 * np.sin((down * a + across * b) / 17) for a, b in ((1, 2), (2, -1), (0.3, 0.9))]
    return np.stack(planes, -1).astype(np.uint8)


def encode(array: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).convert(mode).save(out, options.pop("format", "JPEG"), **options)
    return out.getvalue()


def with_sampling(jpeg: bytes, factors: tuple[int, int, int]) -> bytes:
    """The same data under other sampling factors (as bytes 0xHV): the height follows, so that the blocks suffice."""
    changed = bytearray(jpeg)
    start = changed.index(b"\xff\xc0") + 4
    blocks = [(f >> 4) * (f & 15) for f in factors]
    h, v = max(f >> 4 for f in factors), max(f & 15 for f in factors)
    height, width = (int.from_bytes(changed[start + k : start + k + 2]) for k in (1, 3))
    available = 3 * -(-height // 8) * -(-width // 8)
    down = available // (sum(blocks) * -(-width // (8 * h)))
    if down < 1:
        return jpeg
    changed[start + 1 : start + 3] = (8 * v * down - 3).to_bytes(2)
    for c, factor in enumerate(factors):
        changed[start + 7 + 3 * c] = factor
    return bytes(changed)


def images() -> Iterator[tuple[str, bytes]]:
    """Names and encoded images."""
    generator = np.random.default_rng(1)
    for number, (width, height) in enumerate(SIZES):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            kind = ("noise", "smooth", "flat")[number % 3]
            options = {"quality": (5, 30, 75, 95, 100)[number % 5], "optimize": number % 2 == 0}
            array = pixels(kind, width, height, generator)
            yield f"{width}x{height}-{subsampling.replace(':', '')}", encode(array, subsampling=subsampling, **options)
        yield f"{width}x{height}-gray", encode(pixels("smooth", width, height, generator), "L", quality=80)
    array = pixels("smooth", 60, 44, generator)
    for quality in (1, 10, 50, 90, 100):
        yield f"quality-{quality}", encode(array, quality=quality, subsampling="4:2:0")
    for restart in (1, 2, 3, 7):
        for subsampling in ("4:4:4", "4:2:0"):
            options = {"subsampling": subsampling, "restart_marker_blocks": restart}
            yield f"restart-{restart}-{subsampling.replace(':', '')}", encode(array, quality=60, **options)
    yield "restart-row", encode(array, quality=60, restart_marker_rows=1)
    yield "restart-gray", encode(array, "L", quality=60, restart_marker_blocks=2)
    flat = encode(pixels("smooth", 96, 96, generator), quality=50, subsampling="4:4:4")
    noisy = encode(pixels("noise", 48, 48, generator), quality=90, subsampling="4:4:4")
    for name, factors in {
        "440": (0x12, 0x11, 0x11),
        "411": (0x41, 0x11, 0x11),
        "441": (0x14, 0x11, 0x11),
        "410": (0x42, 0x11, 0x11),
        "422-chroma": (0x11, 0x21, 0x11),
        "three": (0x31, 0x11, 0x11),
        "three-down": (0x13, 0x11, 0x13),
        "mixed": (0x22, 0x21, 0x12),
        "too-many": (0x44, 0x22, 0x22),
    }.items():
        yield f"sampling-{name}", with_sampling(flat, factors)
        yield f"sampling-{name}-noise", with_sampling(noisy, factors)
    yield "exif", encode(array, quality=70, exif=Image.Exif(), comment=b"a comment")
    yield "tables-only-luma", encode(array, quality=70, qtables=[[1] * 64])
    yield "progressive", encode(array, quality=60, progressive=True)
    yield "cmyk", encode(array, "CMYK", quality=60)
    yield "rgb", encode(array, quality=60, keep_rgb=True)
    yield "png", encode(array[:8, :8], format="PNG")
    whole = encode(array, quality=60)
    for cut in (2, 20, 200, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        yield f"cut-{cut}", whole[:cut]
    yield "bytes-after", whole + b"\xff\xd9 and more"


def index_file(row: int, offset: int, size: int) -> bytes:
    """The front of a crop index file whose directory says this of a row."""
    entry = offset.to_bytes(8, "little") + size.to_bytes(8, "little")
    return bytes(64) + bytes(16 * row) + entry


def tail_of(mode: int, generator: np.random.Generator) -> bytes:
    noise = generator.integers(0, 256, 24, dtype=np.uint8).tobytes()
    if mode < 2:
        return b""
    if mode < 5:
        return noise
    return index_file(int(noise[0]) % 4, 64, 40) + noise


def inputs() -> Iterator[tuple[str, bytes]]:
    """Names and inputs."""
    generator = np.random.default_rng(2)
    for number, (name, image) in enumerate(images()):
        for mode in (number % MODES, (number + 3) % MODES):
            control = bytearray(generator.integers(0, 256, CONTROL, dtype=np.uint8).tobytes())
            tail = tail_of(mode, generator)
            control[0], control[1], control[2], control[12] = mode, number % 48, number % 8, FLAGS
            control[14:16] = len(tail).to_bytes(2)
            yield f"{name}-{mode}", bytes(control) + image + tail


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name, content in inputs():
        (out / name).write_bytes(content)


if __name__ == "__main__":
    main()
