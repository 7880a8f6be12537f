"""Which bytes are an image, and the extension that its content calls for.

File names lie: ImageNet's ``n02105855_2933.JPEG`` is a PNG. The extension of a sample therefore comes from its
first bytes, so that a reader that picks its decoder by extension picks the right one.
"""

from __future__ import annotations

SNIFF_BYTES = 16
"""How many leading bytes `image_extension` needs."""

IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "jp2", "avif")
)
"""Extensions (lower case, no dot) that mark the image among the components of a sample."""

_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
)


def image_extension(data: bytes) -> str | None:
    """Extension, without dot, of the image format that these bytes begin with; None if they are no image.

    Args:
        data: the file's bytes, or at least its first `SNIFF_BYTES`.
    """
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":  # the reserved field: "BM" alone begins many texts
        return "bmp"
    if data[:2] in (b"P4", b"P5", b"P6") and data[2:3].isspace():
        return {b"4": "pbm", b"5": "pgm", b"6": "ppm"}[data[1:2]]
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return None
