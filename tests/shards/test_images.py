"""What an image is, from its header: against Pillow for everything that Pillow writes, and on hostile bytes."""

from __future__ import annotations

import io
import random
import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.images import ImageHeader, describe_image

WIDTH, HEIGHT = 37, 23


def picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode in ("LA", "RGBA"):
        image.putalpha(image.convert("L"))  # encoders drop a channel that says nothing
    return image.convert(mode)


def encode(mode: str, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def segment(code: int, body: bytes = b"") -> bytes:
    return bytes((0xFF, code)) + struct.pack(">H", len(body) + 2) + body


def frame(code: int = 0xC0, components: int = 3, bits: int = 8, identifiers: bytes = b"\1\2\3\4") -> bytes:
    parts = b"".join(bytes((identifiers[i], 0x11, 0)) for i in range(components))
    return segment(code, struct.pack(">B2HB", bits, HEIGHT, WIDTH, components) + parts)


def scan(components: int = 3) -> bytes:
    return segment(0xDA, bytes((components,)) + bytes(2 * components + 3))


JFIF = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes((transform,)))


def jpeg(*segments: bytes) -> bytes:
    return b"\xff\xd8" + b"".join(segments)


ENCODINGS = [
    # mode, kind, options, (format, components, colour, kind of image)
    ("RGB", "JPEG", {}, ("jpg", 3, "YCbCr", "JPEG")),
    ("RGB", "JPEG", {"subsampling": 0, "optimize": True}, ("jpg", 3, "YCbCr", "JPEG")),
    ("RGB", "JPEG", {"exif": b"Exif\0\0" + b"\xff\xc2\xff\xda" * 50}, ("jpg", 3, "YCbCr", "JPEG")),
    ("RGB", "JPEG", {"restart_marker_blocks": 1, "comment": b"x" * 60_000}, ("jpg", 3, "YCbCr", "JPEG")),
    ("RGB", "JPEG", {"progressive": True}, ("jpg", 3, "YCbCr", "progressive JPEG")),
    ("RGB", "JPEG", {"keep_rgb": True}, ("jpg", 3, "RGB", "RGB JPEG")),
    ("L", "JPEG", {}, ("jpg", 1, "gray", "gray JPEG")),
    ("L", "JPEG", {"progressive": True}, ("jpg", 1, "gray", "progressive gray JPEG")),
    ("CMYK", "JPEG", {}, ("jpg", 4, "CMYK", "CMYK JPEG")),
    ("CMYK", "JPEG", {"progressive": True}, ("jpg", 4, "CMYK", "progressive CMYK JPEG")),
    ("1", "PNG", {}, ("png", 1, "gray", "PNG")),
    ("L", "PNG", {}, ("png", 1, "gray", "PNG")),
    ("LA", "PNG", {}, ("png", 2, "gray+alpha", "PNG")),
    ("P", "PNG", {}, ("png", 1, "palette", "PNG")),
    ("RGB", "PNG", {}, ("png", 3, "RGB", "PNG")),
    ("RGBA", "PNG", {}, ("png", 4, "RGB+alpha", "PNG")),
    ("P", "GIF", {}, ("gif", 1, "palette", "GIF")),
    ("RGB", "BMP", {}, ("bmp", 3, "RGB", "BMP")),
    ("L", "BMP", {}, ("bmp", 1, "palette", "BMP")),
    ("RGB", "WEBP", {}, ("webp", 3, "RGB", "WEBP")),
    ("RGB", "WEBP", {"lossless": True}, ("webp", 3, "RGB", "WEBP")),
    ("RGBA", "WEBP", {"lossless": True}, ("webp", 4, "RGB+alpha", "WEBP")),
    ("RGB", "WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}, ("webp", 3, "RGB", "WEBP")),
    ("RGB", "PPM", {}, ("ppm", 3, "RGB", "PPM")),
    ("L", "PPM", {}, ("pgm", 1, "gray", "PGM")),
    ("1", "PPM", {}, ("pbm", 1, "gray", "PBM")),
]


@pytest.mark.parametrize(("mode", "kind", "options", "expected"), ENCODINGS)
def test_header_of_what_pillow_writes(mode, kind, options, expected):
    data = encode(mode, kind, **options)
    header = describe_image(data)
    assert (header.format, header.components, header.colour, header.kind) == expected
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    assert header.bits == (1 if mode == "1" else 8)
    image = Image.open(io.BytesIO(data))
    assert image.size == (header.width, header.height)
    assert header.progressive == bool(image.info.get("progressive"))
    if kind == "JPEG":
        assert header.bits == image.bits and header.components == image.layers
    assert header.odd == (header.kind not in ("JPEG", "gray JPEG"))


@pytest.mark.parametrize("kind", ["TIFF", "JPEG2000", "AVIF"])
def test_formats_whose_header_is_not_read_are_named(kind):
    try:
        data = encode("RGB", kind)
    except (KeyError, OSError):
        pytest.skip(f"Pillow was built without {kind}")
    header = describe_image(data)
    assert header.kind in ("TIFF", "JP2", "AVIF") and header.width is None and header.odd


@pytest.mark.parametrize(
    ("segments", "kind"),
    [
        # libjpeg's rule: a JFIF marker beats Adobe's, which beats the names of the components
        ([JFIF, frame(), scan()], "JPEG"),
        ([frame(), scan()], "JPEG"),
        ([frame(identifiers=b"RGB"), scan()], "RGB JPEG"),
        ([adobe(0), frame(), scan()], "RGB JPEG"),
        ([frame(), adobe(0), scan()], "RGB JPEG"),
        ([adobe(1), frame(), scan()], "JPEG"),
        ([JFIF, adobe(0), frame(), scan()], "JPEG"),
        ([adobe(2), frame(components=4), scan(4)], "YCCK JPEG"),
        ([adobe(0), frame(components=4), scan(4)], "CMYK JPEG"),
        ([frame(components=4), scan(4)], "CMYK JPEG"),
        ([frame(components=2), scan(2)], "2-component JPEG"),
        ([frame(0xC1), scan()], "JPEG"),
        ([frame(0xC1, bits=12), scan()], "12-bit JPEG"),
        ([frame(0xC3), scan()], "lossless JPEG"),
        ([frame(0xC9), scan()], "arithmetic JPEG"),
        ([frame(0xCA, components=1), scan(1)], "arithmetic progressive gray JPEG"),
        ([frame(0xC5), scan()], "hierarchical JPEG"),
        ([frame(0xCF), scan()], "arithmetic hierarchical JPEG"),
        ([frame(), scan(1)], "multi-scan JPEG"),
        ([segment(0xC4, bytes(19)), segment(0xCC, b"\0\0"), frame(), scan()], "JPEG"),
        ([b"\xff\xff\xff" + frame(), b"lost bytes", scan()], "JPEG"),
        ([scan(), frame()], "damaged JPEG"),
        ([], "damaged JPEG"),
        ([frame()[:6]], "damaged JPEG"),
        ([frame(components=0), scan()], "damaged JPEG"),
        ([frame(bits=99), scan()], "damaged JPEG"),
        ([b"\xff\xe0\0\0", frame(), scan()], "damaged JPEG"),
    ],
)
def test_markers_of_a_jpeg(segments, kind):
    data = jpeg(*segments)
    header = describe_image(data if len(data) > 2 else data + b"\xff")
    assert header.kind == kind
    assert (header.width, header.height) == ((None, None) if "damaged" in kind else (WIDTH, HEIGHT))


@pytest.mark.parametrize(
    "data",
    [
        jpeg(*[segment(0xFE)] * 500_000),
        jpeg(b"\xff" * 2_000_000 + b"\0"),
        jpeg(b"\xff\0" * 1_000_000),
        jpeg(b"\xff\xd0" * 1_000_000),
        jpeg(JFIF, b"\0" * 20_000_000),
    ],
    ids=["segments", "fill bytes", "stuffed bytes", "restart markers", "zeros"],
)
def test_hostile_jpeg_takes_no_time(data):
    started = time.process_time()
    assert describe_image(data).kind == "damaged JPEG"
    assert time.process_time() - started < 1


def test_no_image():
    for data in (b"", b"\xff\xd8", b"hello", b"%!PS-Adobe", b"<svg>", bytes(100)):
        assert describe_image(data) is None


@given(st.binary(max_size=200), st.integers(0, len(ENCODINGS) - 1), st.integers(0, 400))
def test_never_raises(noise, number, kept):
    mode, kind, options, _ = ENCODINGS[number]
    whole = encode(mode, kind, **options)
    for data in (whole[:kept] + noise, whole[:kept] + noise + whole[kept + len(noise) :]):
        header = describe_image(data)
        assert header is None or isinstance(header, ImageHeader)
        if header is not None:
            assert isinstance(header.kind, str) and isinstance(header.odd, bool)


def test_damage_after_the_header_changes_nothing():
    data = encode("RGB", "JPEG", progressive=True)
    expected = describe_image(data)
    start = data.index(b"\xff\xda")
    shuffled = bytearray(data[start + 20 :])
    random.Random(1).shuffle(shuffled)
    assert describe_image(data[: start + 20] + shuffled) == expected == describe_image(data[: start + 20])
