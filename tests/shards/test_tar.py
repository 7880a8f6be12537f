"""The header scanner against the standard library's tarfile, and against damaged and hostile archives."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.tar import BLOCK, Member, scan, scan_bytes, split_name

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}

NAMES = [
    "a.jpg",
    "./b.cls",
    "x" * 99 + ".jpg",
    "folder/" * 12 + "deep.jpg",
    "folder/" * 20 + "deeper.png",
    "y" * 300 + ".webp",
    "名前/é.jpg",
]
SIZES = (0, 1, 511, 512, 513, 2000)


def build(members: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, data: bytes = b"1", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_of_tarfile(tmp_path, format):
    names = [name for name in NAMES if format != "ustar" or len(name.rpartition("/")[2]) < 100 > len(name) - 90]
    members = [member("folder", b"", type=tarfile.DIRTYPE)]
    members += [member(name, os.urandom(SIZES[i % len(SIZES)])) for i, name in enumerate(names)]
    path = tmp_path / "shard.tar"
    path.write_bytes(build(members, FORMATS[format]))
    with tarfile.open(path) as tar:
        expected = [Member(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    assert list(scan(path)) == expected
    assert len(expected) == len(names)


def test_sizes_in_base_256_and_in_pax_records(tmp_path):
    plain = build([member("a.jpg", b"x" * 700), member("b.jpg", b"y")])
    header = bytearray(plain[:BLOCK])
    header[124:136] = b"\x80" + (700).to_bytes(11, "big")
    path = tmp_path / "shard.tar"
    path.write_bytes(with_checksum(header) + plain[BLOCK:])
    assert list(scan(path)) == [Member("a.jpg", 512, 700), Member("b.jpg", 2048, 1)]

    header[124:136] = b"00000000000\0"  # what writers put there when only the PAX record tells the size
    pax = tarfile.TarInfo("a.jpg").create_pax_header({**tarfile.TarInfo("a.jpg").get_info(), "size": 9**12}, "utf-8")
    record = bytearray(pax[:-BLOCK])
    record[BLOCK:] = b"12 size=700\n".ljust(len(record) - BLOCK, b"\0")
    record[124:136] = b"%011o\0" % 12
    path.write_bytes(with_checksum(record[:BLOCK]) + bytes(record[BLOCK:]) + with_checksum(header) + plain[BLOCK:])
    assert [(m.name, m.size) for m in scan(path)] == [("a.jpg", 700), ("b.jpg", 1)]


@pytest.mark.parametrize("format", FORMATS)
def test_truncation_anywhere_is_an_error_naming_shard_and_byte(tmp_path, format):
    whole = build(
        [member("a.cls"), member("n" * 90 + ".jpg", b"j" * 1500), member("p/" * 60 + "b.cls", b"2")], FORMATS[format]
    )
    path = tmp_path / "shard.tar"
    path.write_bytes(whole)
    expected = list(scan(path))
    end = len(whole.rstrip(b"\0"))
    end += -end % BLOCK + 2 * BLOCK  # what follows is padding to the record size
    assert len(expected) == 3
    for length in sorted({*range(0, end, 37), *range(0, end, BLOCK), *range(511, end, BLOCK), end - 1}):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"shard\.tar: byte [\d,]+: ") as error:
            list(scan(path))
        assert "truncated" in error.value.headline, (length, error.value)
    path.write_bytes(whole[:end])
    assert list(scan(path)) == expected


def nest(path: Path, content: bytes) -> Member:
    """Write a tar with the tar `content` in the middle of it."""
    path.write_bytes(build([member("a.tar", build([])), member("b.tar", content), member("c.tar", b"c" * 3000)]))
    return list(scan(path))[1]


@pytest.mark.parametrize("format", FORMATS)
def test_a_tar_inside_a_tar_is_scanned_in_place(tmp_path, format):
    files = {f"n01_{i}.JPEG": os.urandom(size) for i, size in enumerate(SIZES)}
    path = tmp_path / "outer.tar"
    content = build([member(name, data) for name, data in files.items()], FORMATS[format])
    inner = nest(path, content)
    whole = path.read_bytes()
    found = list(scan(path, inner))
    assert {m.name: whole[m.offset : m.offset + m.size] for m in found} == files
    assert list(scan_bytes(content, "memory")) == [Member(m.name, m.offset - inner.offset, m.size) for m in found]


def test_nothing_beyond_the_end_of_an_inner_tar_is_read(tmp_path):
    path = tmp_path / "outer.tar"
    inner = nest(path, build([member("a.jpg", b"a" * 700), member("b.jpg", b"b" * 700)]))
    for size in (*range(0, 6 * BLOCK, 100), 6 * BLOCK, 7 * BLOCK):
        with pytest.raises(UserError, match=r"outer\.tar: b\.tar: byte [\d,]+: truncated") as error:
            list(scan(path, Member("b.tar", inner.offset, size)))
        assert f"ends at {inner.offset + size:,}" in str(error.value)
    exact = Member("b.tar", inner.offset, 8 * BLOCK)
    assert [m.name for m in scan(path, exact)] == ["a.jpg", "b.jpg"], "the next member is no padding of this tar"


HOSTILE = {
    "absolute path": ([member("/etc/cron.d/job.jpg")], "unsafe member name"),
    "leaves the folder": ([member("a/../../b.jpg")], "unsafe member name"),
    "symbolic link": ([member("a.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "symbolic link"),
    "hard link": ([member("a.jpg", b"", type=tarfile.LNKTYPE, linkname="b.jpg")], "hard link"),
    "long link": ([member("a.jpg", b"", type=tarfile.SYMTYPE, linkname="x" * 300)], "symbolic link"),
    "character device": ([member("a.jpg", b"", type=tarfile.CHRTYPE)], "character device"),
    "block device": ([member("a.jpg", b"", type=tarfile.BLKTYPE)], "block device"),
    "FIFO": ([member("a.jpg", b"", type=tarfile.FIFOTYPE)], "FIFO"),
    "sparse file": ([member("a.jpg", b"", type=tarfile.GNUTYPE_SPARSE)], "sparse"),
    "PAX sparse file": ([member("a.jpg", pax_headers={"GNU.sparse.major": "1"})], "sparse"),
    "unknown type": ([member("a.jpg", b"", type=b"Q")], "unknown type"),
    "empty name": ([member("")], "unsafe member name"),
    "header bomb": ([member("a.jpg", pax_headers={"comment": "x" * (2 << 20)})], "extension header of"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_members_are_refused(tmp_path, what):
    members, message = HOSTILE[what]
    format = tarfile.PAX_FORMAT if members[0][0].pax_headers else tarfile.GNU_FORMAT
    path = tmp_path / "shard.tar"
    path.write_bytes(build([member("fine.cls"), *members], format))
    with pytest.raises(UserError, match=rf"shard\.tar: byte .*{message}"):
        list(scan(path))


def test_huge_size_bad_checksum_foreign_content_and_joined_tars(tmp_path):
    plain = build([member("a.jpg", b"x")])
    path = tmp_path / "shard.tar"
    header = bytearray(plain[:BLOCK])
    header[124:136] = b"\x80" + b"\x7f" * 11
    cases = {
        "needs": with_checksum(header) + plain[BLOCK:],
        "wrong checksum": plain[:5] + b"!" + plain[6:],
        "not a tar header": b"\x1f\x8b" + os.urandom(2000),
        "data after the end": plain + plain,
        "truncated": b"",
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"shard.*{message}"):
            list(scan(path))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("fifo.tar", "folder.tar", "absent.tar"):
        with pytest.raises(UserError, match=name):
            list(scan(tmp_path / name))


def test_names_split_as_webdataset_splits_them():
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "a.b.jpg", "d.e/a.jpg", "d.e/f/a.0.seg.png", "./a.cls", "a"):
        assert (split_name(name) or (None, None)) == base_plus_ext(name), name
    assert split_name("folder/.hidden") is None
    assert split_name(".hidden.jpg") is None
