"""What a JPEG says about itself before its first scan, read without decoding anything.

The markers from SOI to the first SOS tell how the image is coded and what its components mean, with the rules of
libjpeg (``jdmarker.c``, ``jdapimin.c``), so that the answer is what a decoder would do. Bytes may be hostile: the
scan goes forward only, its steps are bounded, and nothing is raised.

Layout: ITU-T T.81 (JPEG), annex B; Adobe technical note 5116 for the APP14 marker.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_MARKER = re.compile(rb"\xff([^\x00\xff])")
"""0xFF may be repeated before a marker's code; libjpeg skips whatever else lies between two segments."""

_MOST_SEGMENTS = 4096
"""A JPEG has a dozen; large ICC profiles and previews take some hundred."""

_TEM, _SOI, _EOI, _SOS, _APP0, _APP14 = 0x01, 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
_WITHOUT_LENGTH = frozenset((_TEM, _SOI, *range(0xD0, 0xD8)))
_NO_FRAME = frozenset((0xC4, 0xC8, 0xCC))  # DHT, JPG and DAC lie among the codes of the SOF markers

_PROCESSES = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive", 0xC3: "lossless"}
"""How the coefficients are coded, by SOF marker; 4 more is hierarchical, 8 more the same with arithmetic coding."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """The frame header of a JPEG and what the markers around it add."""

    width: int
    """In pixels, as stored: EXIF's orientation does not enter."""
    height: int
    components: int
    bits: int
    """Per component."""
    process: str
    """"baseline", "extended" (sequential too), "progressive", "lossless" or "hierarchical"."""
    arithmetic: bool
    """Arithmetic coding in place of Huffman's."""
    colour: str
    """"gray", "YCbCr", "RGB", "CMYK" or "YCCK", as libjpeg decides; "unknown" for two components."""
    one_scan: bool
    """Whether the first scan holds all components."""


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the markers of a JPEG up to its first scan.

    Args:
        data: the file's bytes, or at least those up to its first SOS marker, beginning with SOI.

    Returns:
        None if there is no frame header before the first scan or before the bytes end, or one that no JPEG has: no
        pixels (the height may not come later, in a DNL marker: libjpeg refuses that too), no components or more
        than four, another precision than 2 to 16 bits.
    """
    frame: tuple[int, bytes] | None = None
    jfif = False
    adobe_transform: int | None = None
    scan_components: int | None = None
    position = 2
    for _ in range(_MOST_SEGMENTS):
        marker = _MARKER.search(data, position)
        if marker is None:
            break
        code, position = marker[1][0], marker.end()
        if code in _WITHOUT_LENGTH:
            continue
        if code == _EOI:
            break
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2:
            break
        if code == _SOS:
            scan_components = int.from_bytes(data[position + 2 : position + 3], "big")
            break
        if 0xC0 <= code <= 0xCF and code not in _NO_FRAME:
            frame = frame or (code, data[position + 2 : position + length])
        elif code == _APP0:
            jfif = jfif or data.startswith(b"JFIF\0", position + 2)
        elif code == _APP14 and length >= 14 and data.startswith(b"Adobe", position + 2):
            adobe_transform = int.from_bytes(data[position + 13 : position + 14], "big")
        position += length
    if frame is None or len(frame[1]) < 6:
        return None
    code, body = frame
    bits, height, width, components = struct.unpack_from(">B2HB", body)
    if not (width and height and 1 <= components <= 4 and 2 <= bits <= 16):
        return None
    return JpegHeader(
        width=width,
        height=height,
        components=components,
        bits=bits,
        process=_PROCESSES.get(code & 0xF7, "hierarchical"),
        arithmetic=code >= 0xC9,
        colour=_colour(components, body[6 : 6 + 3 * components : 3], jfif, adobe_transform),
        one_scan=scan_components in (None, components),
    )


def _colour(components: int, identifiers: bytes, jfif: bool, adobe_transform: int | None) -> str:
    """libjpeg's rule (``default_decompress_parms``)."""
    if components == 1:
        return "gray"
    if components == 3:
        if jfif:
            return "YCbCr"
        if adobe_transform is not None:
            return "RGB" if adobe_transform == 0 else "YCbCr"
        return "RGB" if identifiers == b"RGB" else "YCbCr"
    if components == 4:
        return "YCCK" if adobe_transform else "CMYK"
    return "unknown"
