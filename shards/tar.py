"""Where the members of a tar lie, from its headers alone.

The scanner reads one page per header and skips the data, so a shard of 140 MB costs some thousand small reads. It
knows what shards contain in practice: ustar (with prefix), GNU long names and base-256 sizes, PAX paths and sizes.
Everything that `tarfile` would forgive is an error here, because an index built over a damaged or hostile tar would
carry the damage into a training run: bad checksums, a missing end of archive, links, devices, sparse files, absolute
paths and ``..``.

A tar that lies inside another one, as ImageNet's classes do, is scanned where it is.

Layout: POSIX.1-2001 (pax) and the GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shards.errors import UserError

BLOCK = 512
"""Unit of a tar, in bytes: headers are one block, data is padded to whole blocks."""

RECORD = 20 * BLOCK
"""Archives are padded with zeros to a multiple of this many bytes, as tar has always done."""

_ZERO_BLOCK = bytes(BLOCK)
_REGULAR_TYPES = (b"0", b"\0")
_DIRECTORY = b"5"
_MAX_EXTENSION_BYTES = 1 << 20
"""No honest name needs more; a larger PAX or long-name header is an attempt to exhaust memory."""
_MAX_EXTENSIONS = 16
"""In a row. One or two are usual: a PAX header, perhaps a global one; long name and long link target."""
_MAX_PADDING = 1 << 24
"""Tars with larger records than usual (``tar --blocking-factor``) end with more zeros, but never so many."""
_READ_BYTES = 4096
"""At each header; a page costs no more than a block, and often holds a label and the next header as well."""

_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"7": "a contiguous file",  # no program writes these any more, and readers disagree about them
    b"S": "a sparse file",
    b"M": "a part of a multi-volume archive",
}


class Member(NamedTuple):
    """One regular file inside a tar; offsets and sizes in bytes."""

    name: str
    offset: int
    """Of the data."""
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member name, by webdataset's rule: at the first dot after the last slash.

    ``train/n01.0.seg.png`` → ``("train/n01", "0.seg.png")``. None for names without an extension, which webdataset
    leaves out, and for hidden files, which DALI's ``wds2idx`` leaves out as well.
    """
    dot = name.find(".", name.rfind("/") + 1)
    if dot <= 0 or name[dot - 1] == "/":
        return None
    return name[:dot], name[dot + 1 :]


def scan(path: Path, inner: Member | None = None) -> Iterator[Member]:
    """The regular files of a tar, in order of appearance.

    Args:
        path: the tar.
        inner: a member of it that is a tar itself: the files of that one are listed instead. Their offsets
            count from the beginning of `path`, and none may reach beyond the inner tar's end.

    Raises:
        UserError: naming the tar and the byte offset, if it is truncated, damaged, or holds anything that
            has no place in a shard. Members before the fault have been yielded by then.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a file")  # opening a FIFO would wait for ever
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        place, start, end = str(path), 0, os.fstat(descriptor).st_size
        if inner is not None:
            place, start, end = f"{path}: {inner.name}", inner.offset, min(end, inner.offset + inner.size)
        yield from _Scanner(place, partial(os.pread, descriptor), start, end).members()
    finally:
        os.close(descriptor)


def scan_bytes(data: bytes, place: str) -> Iterator[Member]:
    """`scan` for a small tar in memory, such as one that was compressed; `place` names it in messages."""
    return _Scanner(place, lambda size, position: data[position : position + size], 0, len(data)).members()


class _Scanner:
    """The tar at bytes `start` to `end` of what `pread` reads, which takes a size and a position."""

    def __init__(self, place: str, pread: Callable[[int, int], bytes], start: int, end: int) -> None:
        self.place = place
        self.pread = pread
        self.start = start
        self.end = end
        self._page, self._page_start = b"", start

    def fault(self, position: int, what: str, *mend: str) -> UserError:
        return UserError(f"{self.place}: byte {position:,}: {what}", *mend)

    def read_up_to(self, position: int, size: int) -> bytes:
        """Fewer bytes than `size` only at the end of the tar."""
        size = min(size, self.end - position)
        try:
            return self.pread(size, position) if size > 0 else b""
        except OSError as error:
            raise self.fault(position, f"cannot be read: {error.strerror}") from error

    def read(self, position: int, size: int, what: str) -> bytes:
        data = self.read_up_to(position, size)
        if len(data) < size:
            raise self.fault(
                position,
                f"truncated inside {what}",
                f"{size:,} bytes are needed there, the tar ends at {self.end:,}.",
                "Copy or make it again.",
            )
        return data

    def header(self, position: int) -> bytes:
        start = position - self._page_start
        header = self._page[start : start + BLOCK]
        if len(header) < BLOCK:
            self._page, self._page_start = self.read_up_to(position, _READ_BYTES), position
            header = self._page[:BLOCK]
        if len(header) < BLOCK:
            return self.read(position, BLOCK, "a header, or the end-of-archive blocks are missing")
        return header

    def members(self) -> Iterator[Member]:
        position = self.start
        overrides: dict[str, str] = {}  # of the next member only: "path" and "size", as PAX calls them
        extensions = 0
        while True:
            header = self.header(position)
            if header == _ZERO_BLOCK:
                return self._check_end(position)
            self._check_sum(position, header)
            kind = header[156:157]
            size = self._number(position, header[124:136], "size")
            data = position + BLOCK
            if kind in (b"x", b"g", b"L", b"K"):
                extension = self._extension(position, kind, size)
                if kind == b"g" and extension.keys() & {"path", "size"}:
                    raise self.fault(position, "a global PAX header that renames or resizes every member")
                overrides |= extension
                extensions += 1
                if extensions > _MAX_EXTENSIONS:
                    raise self.fault(position, f"more than {_MAX_EXTENSIONS} extension headers in a row")
            else:
                if kind in _REGULAR_TYPES and "size" in overrides:
                    size = self._decimal(position, overrides["size"])
                name = overrides.get("path") or self._plain_name(position, header)
                overrides, extensions = {}, 0
                self._check_name(position, name)
                if kind == _DIRECTORY or (kind == b"\0" and name.endswith("/")):
                    size = 0
                elif kind in _REGULAR_TYPES:
                    if data + size > self.end:
                        raise self.fault(
                            data,
                            f"truncated: {name} needs {size:,} bytes, the tar ends at {self.end:,}",
                            "Copy or make it again.",
                        )
                    yield Member(name, data, size)
                else:
                    what = _REFUSED_TYPES.get(kind, f"a member of unknown type {kind!r}")
                    raise self.fault(position, f"{name} is {what}; only regular files are read")
            position = data + -(-size // BLOCK) * BLOCK

    def _check_end(self, position: int) -> None:
        """Two zero blocks end an archive; what follows may only be padding."""
        tail = self.read(position, 2 * BLOCK, "the end-of-archive blocks")
        tail += self.read_up_to(position + 2 * BLOCK, _MAX_PADDING)
        if tail.strip(b"\0") or position + len(tail) < self.end:
            raise self.fault(
                position,
                "data after the end of the archive",
                "Tars joined with cat look like this: readers stop here and never see the rest.",
                "Join them with tar --concatenate, or keep them apart.",
            )

    def _check_sum(self, position: int, header: bytes) -> None:
        # the checksum field itself counts as eight blanks; bytes are unsigned (POSIX), signed in some old tars
        unsigned = sum(header) - sum(header[148:156]) + 8 * 0x20
        stored = self._number(position, header[148:156], "checksum")
        if stored == unsigned:
            return
        signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
        if stored != signed:
            raise self.fault(
                position,
                "not a tar header (wrong checksum)",
                "The tar is damaged, compressed, or no tar at all. Copy or make it again.",
            )

    def _number(self, position: int, field: bytes, what: str) -> int:
        if field[0] == 0x80:  # GNU base-256
            return int.from_bytes(field[1:], "big")
        text = field.partition(b"\0")[0].strip()
        try:
            if text and not text.isdigit():  # int() takes signs, underscores and prefixes
                raise ValueError
            return int(text or b"0", 8)
        except ValueError:
            raise self.fault(position, f"not a tar header ({what} is no octal number)") from None

    def _decimal(self, position: int, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 20):
            raise self.fault(position, f"PAX size {text[:40]!r} is no number")
        return int(text)

    def _plain_name(self, position: int, header: bytes) -> str:
        name = header[:100].partition(b"\0")[0]
        if header[257:263] == b"ustar\0":  # GNU's "ustar  " keeps other things where the prefix would be
            prefix = header[345:500].partition(b"\0")[0]
            if prefix:
                name = prefix + b"/" + name
        return self._text(position, name)

    def _text(self, position: int, name: bytes) -> str:
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(position, f"member name {name[:80]!r} is not UTF-8") from None

    def _extension(self, position: int, kind: bytes, size: int) -> dict[str, str]:
        """What a PAX or GNU extension header says about the member after it."""
        if size > _MAX_EXTENSION_BYTES:
            raise self.fault(position, f"an extension header of {size:,} bytes")
        data = self.read(position + BLOCK, size, "an extension header")
        if kind == b"K":
            return {}  # a long link target: the link itself is refused when it comes
        if kind == b"L":
            return {"path": self._text(position, data.partition(b"\0")[0])}
        return self._pax_records(position, data)

    def _pax_records(self, position: int, data: bytes) -> dict[str, str]:
        """Records are ``"<length> <key>=<value>\\n"``, the length counting the whole record in decimal."""
        records: dict[str, str] = {}
        start = 0
        while start < len(data) and data[start] != 0:
            digits = data[start : start + 20].partition(b" ")[0]
            length = int(digits) if digits.isdigit() else 0
            record = data[start + len(digits) + 1 : start + length]
            key, equals, value = record.partition(b"=")
            if length > len(data) - start or not equals or not value.endswith(b"\n"):
                raise self.fault(position, "a damaged PAX header")
            if key.startswith(b"GNU.sparse."):
                raise self.fault(position, "a sparse file; only regular files are read")
            if key in (b"path", b"size"):
                records[key.decode()] = self._text(position, value[:-1])
            start += length
        return records

    def _check_name(self, position: int, name: str) -> None:
        if not name or "\0" in name or name.startswith("/") or ".." in name.split("/"):
            raise self.fault(
                position,
                f"unsafe member name {name[:200]!r}",
                "Names must be relative and stay inside the tar's own folder.",
            )
