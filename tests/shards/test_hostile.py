"""Damaged and hostile inputs: each ends soon in one clear message, in bounded memory, with nothing written elsewhere.

Tars are built header by header, because no library writes what is wanted here.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import resource
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.errors import UserError
from shards.index import load_split
from shards.table import SAMPLE_DTYPE
from shards.tar import BLOCK

pytestmark = pytest.mark.timeout(20)

MEMORY = 600_000_000
"""Bytes that an input may make the process grow by: more than any honest one of this size needs."""


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Whoever believes a size in a header and asks for that much memory fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder for the input beside one that nothing may touch; commands run inside an empty one."""
    for name in ("input", "untouched", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "untouched" / "file").write_text("as it was")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def outside(place: Path, output: Path) -> dict[str, object]:
    """What lies around the output folder."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if Path(folder, name) != output]
        for name in folders + files:
            status = os.lstat(os.path.join(folder, name))  # noqa: PTH118
            found[os.path.join(folder, name)] = (status.st_mode, status.st_size, status.st_mtime_ns)  # noqa: PTH118
    return {path: status for path, status in found.items() if not Path(path).is_dir()} | {
        path: None for path in found if Path(path).is_dir()
    }


# ---- tars


def header(
    name: bytes = b"a.jpg",
    size: bytes | int = 1,
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: int = 0,
) -> bytes:
    """One block; a size in bytes goes in as it is, and a number is added to the right checksum."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = (b"%011o\0" % size if isinstance(size, int) else size).ljust(12, b"\0")
    block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind, magic
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) + checksum)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def plain(name: bytes, data: bytes) -> bytes:
    return header(name, len(data)) + padded(data)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return header(b"pax", len(records), kind) + padded(records)


def record(key: str, value: bytes) -> bytes:
    body = b" %s=%s\n" % (key.encode(), value)
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def sparse(beginning: bytes, size: int) -> Callable[[Path], None]:
    """A file of that many bytes that takes no room."""

    def write(path: Path) -> None:
        path.write_bytes(beginning)
        os.truncate(path, size)

    return write


END = bytes(2 * BLOCK)
LABEL = plain(b"a.cls", b"0")
GOOD = LABEL + plain(b"a.jpg", b"\xff\xd8\xff" + b"j" * 700)
HUGE = 1 << 40


def special(member: bytes) -> bytes:
    return GOOD + member + END


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jpg", "j")
    return buffer.getvalue()


TARS: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "absolute path": (special(plain(b"/etc/a.jpg", b"j")), "unsafe member name '/etc/a.jpg'"),
    "path upwards": (special(plain(b"../a.jpg", b"j")), "unsafe member name"),
    "path upwards inside": (special(plain(b"b/../../a.jpg", b"j")), "unsafe member name"),
    "absolute path in a PAX record": (special(pax(record("path", b"/a.jpg")) + plain(b"b.jpg", b"j")), "unsafe"),
    "path upwards in a GNU long name": (
        special(header(b"L", 9, b"L", b"ustar  \0") + padded(b"../a.jpg\0") + plain(b"b.jpg", b"j")),
        "unsafe",
    ),
    "path upwards by a prefix": (special(header(b"a.jpg", 0, prefix=b"../b")), "unsafe member name '../b/a.jpg'"),
    "no name": (special(header(b"", 0)), "unsafe member name ''"),
    "NUL in a name": (special(pax(record("path", b"a\0b.jpg")) + plain(b"b.jpg", b"j")), "unsafe"),
    "name that is not UTF-8": (special(plain(b"\xff\xfe.jpg", b"j")), "not UTF-8"),
    "PAX name that is not UTF-8": (special(pax(record("path", b"\xff.jpg")) + plain(b"b.jpg", b"j")), "not UTF-8"),
    "hard link": (special(header(b"b.jpg", 0, b"1")), "a hard link"),
    "symbolic link": (special(header(b"b.jpg", 0, b"2")), "a symbolic link"),
    "character device": (special(header(b"b.jpg", 0, b"3")), "a character device"),
    "block device": (special(header(b"b.jpg", 0, b"4")), "a block device"),
    "FIFO": (special(header(b"b.jpg", 0, b"6")), "a FIFO"),
    "contiguous file": (special(header(b"b.jpg", 0, b"7")), "a contiguous file"),
    "multi-volume part": (special(header(b"b.jpg", 0, b"M")), "multi-volume"),
    "GNU sparse file": (special(header(b"b.jpg", 0, b"S")), "a sparse file"),
    "PAX sparse file": (special(pax(record("GNU.sparse.major", b"1")) + plain(b"b.jpg", b"j")), "a sparse file"),
    "unknown type": (special(header(b"b.jpg", 0, b"Z")), "unknown type b'Z'"),
    "huge size in octal": (special(header(b"b.jpg", b"77777777777")), "truncated"),
    "huge size in base 256": (special(header(b"b.jpg", b"\x80" + b"\xff" * 11)), "truncated"),
    "size of 2^63 in base 256": (special(header(b"b.jpg", b"\x80" + (1 << 63).to_bytes(11, "big"))), "truncated"),
    "negative size in base 256": (special(header(b"b.jpg", b"\xff" * 12)), "size is no octal number"),
    "size that is no number": (special(header(b"b.jpg", b"12x")), "size is no octal number"),
    "size with a sign": (special(header(b"b.jpg", b"+7")), "size is no octal number"),
    "size with an underscore": (special(header(b"b.jpg", b"1_0")), "size is no octal number"),
    "size with Python's prefix": (special(header(b"b.jpg", b"0o17")), "size is no octal number"),
    "huge PAX size": (special(pax(record("size", b"9" * 19)) + plain(b"b.jpg", b"j")), "truncated"),
    "PAX size beyond 2^64": (special(pax(record("size", b"9" * 30)) + plain(b"b.jpg", b"j")), "is no number"),
    "negative PAX size": (special(pax(record("size", b"-512")) + plain(b"b.jpg", b"j")), "is no number"),
    "PAX size in other digits": (special(pax(record("size", "٣".encode())) + plain(b"b.jpg", b"j")), "is no number"),
    "PAX header of 2 MiB": (special(pax(record("path", b"a" * (1 << 21))) + plain(b"b.jpg", b"j")), "extension header"),
    "PAX header of 1 TB": (special(header(b"x", b"\x80" + HUGE.to_bytes(11, "big"), b"x")), "extension header"),
    "GNU long name of 1 GB": (sparse(GOOD + header(b"L", 1 << 30, b"L", b"ustar  \0"), 1 << 26), "extension header"),
    "2,000 PAX headers in a row": (
        special(pax(record("path", b"c.jpg")) * 2000 + plain(b"b.jpg", b"j")),
        "extension headers in a row",
    ),
    "PAX record longer than its header": (special(pax(b"99 path=a.jpg\n") + plain(b"b.jpg", b"j")), "damaged PAX"),
    "PAX record of length 0": (special(pax(b"0 path=a.jpg\n") + plain(b"b.jpg", b"j")), "damaged PAX"),
    "PAX record without length": (special(pax(b"path=a.jpg\n") + plain(b"b.jpg", b"j")), "damaged PAX"),
    "PAX record without value": (special(pax(b"9 path a\n") + plain(b"b.jpg", b"j")), "damaged PAX"),
    "PAX record of a million digits": (special(pax(b"1" * 999_999) + plain(b"b.jpg", b"j")), "damaged PAX"),
    "global PAX header that renames": (special(pax(record("path", b"a"), b"g") + plain(b"b.jpg", b"j")), "global PAX"),
    "wrong checksum": (special(header(b"b.jpg", 0, checksum=1)), "wrong checksum"),
    "truncated in a header": (GOOD[: BLOCK + 200], "truncated"),
    "truncated in data": (GOOD[:-100], "truncated"),
    "truncated in a PAX header": (GOOD + pax(record("path", b"a" * 600))[: BLOCK + 300], "truncated"),
    "no end": (GOOD, "truncated"),
    "half an end": (GOOD + END[:BLOCK], "truncated"),
    "empty file": (b"", "truncated"),
    "text": (b"<html>404 Not Found</html>" * 100, "not a tar header"),
    "tars joined with cat": (GOOD + END + GOOD + END, "data after the end"),
    "data far after the end": (GOOD + bytes(1 << 20) + b"more", "data after the end"),
    "64 MB of nothing after the end": (sparse(GOOD, 1 << 26), "data after the end"),
    "compressed with gzip": (gzip.compress(GOOD + END), ""),
    "compressed with bzip2": (bz2.compress(GOOD + END), ""),
    "compressed with xz": (lzma.compress(GOOD + END), ""),
    "zip": (zipped() * 5, ""),
    "folder": (Path.mkdir, "not a file"),
    "named pipe": (os.mkfifo, "not a file"),
    "symbolic link to itself": (lambda path: path.symlink_to(path.name), ""),
    "symbolic link to a device without end": (lambda path: path.symlink_to("/dev/zero"), "not a file"),
    "nothing but zeros": (bytes(20 * BLOCK), ""),
}


def write(content: bytes | Callable[[Path], None], path: Path) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


@pytest.mark.parametrize("command", ["index", "show", "prepare webdataset", "prepare imagenet-tar"])
@pytest.mark.parametrize("name", TARS)
def test_tar_is_refused(place, refuse, name, command):
    content, message = TARS[name]
    tar = place / "input" / "train-0.tar"
    write(content, tar)
    output = place / ("input" if command == "index" else "out")
    before = outside(place, output)
    target = tar if command in ("show", "prepare imagenet-tar") else tar.parent
    said = refuse(*command.split(), target, *([output] if "prepare" in command else []))
    assert "train-0.tar" in said
    # imagenet-tar says what archive it expected instead; to show, a folder is a data set without index
    if command != "prepare imagenet-tar" and (name, command) != ("folder", "show"):
        assert message in said
    assert len(said.splitlines()) <= 6
    assert outside(place, output) == before
    assert not (output / "index.json").exists() and not list(output.glob("*.idx"))


@pytest.mark.parametrize("name", [name for name, (content, _) in TARS.items() if isinstance(content, bytes)])
def test_tar_inside_a_tar_is_refused(place, refuse, name):
    content, message = TARS[name]
    tar = place / "input" / "train.tar"
    tar.write_bytes(plain(b"n01440764.tar", content) + END)
    before = outside(place, place / "out")
    said = refuse("prepare", "imagenet-tar", tar, place / "out")
    assert "n01440764.tar" in said and message in said
    assert outside(place, place / "out") == before


@pytest.mark.parametrize("name", TARS)
def test_shard_that_was_swapped_is_reported(place, data_set, run, name):
    shard = data_set / "train-00000.tar"
    shard.unlink()
    write(TARS[name][0], shard)
    index = json.loads((data_set / "index.json").read_bytes())
    size = os.lstat(shard).st_size
    index["datasets"][0]["shardlist"][0]["filesize"] = max(size, 1)  # as one would who wants it to be read
    (data_set / "index.json").write_text(json.dumps(index))
    before = outside(place, data_set)
    code, said, error = run("verify", data_set)
    assert code == 1 and not error and "problem   train-00000.tar" in said and "Traceback" not in said
    with pytest.raises(UserError, match=r"train-00000\.(tar|idx)"):
        load_split(data_set, "train")
    assert outside(place, data_set) == before


# ---- samples in tars that are in order


@pytest.mark.parametrize(
    "label",
    ["٣", "-1", "+1", "1e3", "0x1", "1_0", "1.0", "", "NaN", "9" * 30, str(2**31), "0\n1", "0 1", "\0", "x" * 5000],
)
def test_label_that_is_no_class_number(place, refuse, label):
    tar = place / "input" / "train-0.tar"
    tar.write_bytes(plain(b"a.jpg", b"j") + plain(b"a.cls", label.encode()) + END)
    said = refuse("index", place / "input")
    assert f"{tar}: key a: label" in said and len(said) < 2000
    assert not (place / "input" / "index.json").exists()


SAMPLES: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "label of 1 GB": (
        sparse(plain(b"a.jpg", b"j") + header(b"a.cls", 1 << 30), (1 << 30) + 10 * BLOCK),
        "1,073,741,824 bytes",
    ),
    "image of 5 GB": (
        sparse(LABEL + header(b"a.jpg", b"\x80" + (5 << 30).to_bytes(11, "big")), (5 << 30) + 10 * BLOCK),
        "an image of 5,368,709,120 bytes",
    ),
    "two images of one name": (GOOD + plain(b"a.jpg", b"j") + END, "two members of this key"),
    "key that comes back": (GOOD + plain(b"b.cls", b"0") + plain(b"b.jpg", b"j") + GOOD + END, "have the key a"),
    "blank in a name": (GOOD + plain(b"b c.jpg", b"j") + END, "contains a blank"),
    "newline in a name": (GOOD + plain(b"b\nc.jpg", b"j") + END, "contains a blank"),
    "no label": (GOOD + plain(b"b.jpg", b"j") + END, "has no label"),
    "no image": (GOOD + plain(b"b.cls", b"0") + END, "has no image"),
    "pickle instead of a label": (GOOD + plain(b"b.jpg", b"j") + plain(b"b.pkl", pickle.dumps(0)) + END, "no label"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_refused(place, refuse, name):
    content, message = SAMPLES[name]
    tar = place / "input" / "train-0.tar"
    write(content, tar)
    # shards index takes the digest of the gigabytes first, which is long for a test and no danger
    command, output = ("index", "input") if isinstance(content, bytes) else ("prepare webdataset", "out")
    before = outside(place, place / output)
    said = refuse(*command.split(), tar.parent, *([place / output] if output == "out" else []))
    assert str(tar) in said and message in said
    assert outside(place, place / output) == before


def png(width: int, height: int) -> bytes:
    """The header of a large picture, and no more."""
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"x"), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def jpeg(side: int) -> bytes:
    """A real picture whose frame header was changed to another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">2H", side, side)
    return bytes(data)


def text_bomb() -> bytes:
    """A PNG whose compressed text chunk unpacks to 200 MB."""
    body = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 1)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    whole = png(8, 8)
    return whole[:33] + chunk + whole[33:]


IMAGES: dict[str, Callable[[], bytes]] = {
    "PNG of 3.6 gigapixels": lambda: png(60_000, 60_000),
    "JPEG of 4.3 gigapixels": lambda: jpeg(65_500),
    "PNG with a text bomb": text_bomb,
    "truncated": lambda: jpeg(16)[:200],
    "no bytes": lambda: b"",
    "no image": lambda: b"<html>404 Not Found</html>",
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_that_must_not_be_decoded(place, run, name):
    folder = place / "input"
    (folder / "train-0.tar").write_bytes(plain(b"a.cls", b"0") + plain(b"a.jpg", IMAGES[name]()) + END)
    assert run("index", folder)[0] == 0
    code, said, _ = run("verify", folder, "--decode")
    assert code == 1 and "problem   train-0.tar: key a: does not decode" in said
    for target in (folder, folder / "train-0.tar"):
        code, said, error = run("show", target, "--out", place / "here" / "sheet.png")
        assert code == 0 and not error
        colours = Image.open(place / "here" / "sheet.png").getcolors(1 << 20)
        assert any(colour == (176, 32, 32) for _, colour in colours), "the cell is marked in red"


# ---- the files of a data set


@pytest.fixture(scope="session")
def two_shards(tmp_path_factory, make_image) -> Path:
    """A data set of two splits, made by `shards index` out of tars of its own."""
    from shards.cli import main

    root = tmp_path_factory.mktemp("hostile") / "data"
    root.mkdir()
    for name, first in (("train-00000", 0), ("train-00001", 10), ("val-00000", 20)):
        members = b"".join(
            plain(b"k%02d.cls" % i, b"%d" % (i % 3)) + plain(b"k%02d.jpg" % i, make_image(i))
            for i in range(first, first + 6)
        )
        (root / f"{name}.tar").write_bytes(members + END)
    assert main(["index", str(root), "--workers", "1"]) == 0
    return root


@pytest.fixture
def data_set(two_shards, place) -> Path:
    """A copy of it without its cached tables."""
    root = place / "data"
    shutil.copytree(two_shards, root)
    shutil.rmtree(root / ".cache")
    return root


def changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change index.json's first shard, or the whole document through key "document"."""

    def apply(path: Path) -> None:
        document = json.loads(path.read_bytes())
        change(document)
        path.write_text(json.dumps(document))

    return apply


def shard_with(**fields: object) -> Callable[[Path], None]:
    return changed(lambda document: document["datasets"][0]["shardlist"][0].update(fields))


def dataset_with(**fields: object) -> Callable[[Path], None]:
    return changed(lambda document: document["datasets"][0].update(fields))


def replaced(content: bytes | Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        write(content, path)

    return apply


DEEP = b"[" * 200_000

INDEX_FILES: dict[str, Callable[[Path], None]] = {
    "absolute path": shard_with(url="/etc/passwd"),
    "path upwards": shard_with(url="../untouched/file"),
    "path upwards inside": shard_with(url="a/../../untouched/file"),
    "URL of a file": shard_with(url="file:///etc/passwd"),
    "URL of a command": shard_with(url="pipe:touch here"),
    "empty path": shard_with(url=""),
    "path with NUL": shard_with(url="a\0.tar"),
    "path that is a number": shard_with(url=7),
    "path that is a folder": shard_with(url="."),
    "lone surrogate": shard_with(url="\ud800.tar"),
    "two equal shards": changed(lambda d: d["datasets"][0]["shardlist"].append(d["datasets"][0]["shardlist"][0])),
    "count that is a text": shard_with(nsamples="6"),
    "count that is a fraction": shard_with(nsamples=6.5),
    "count that is true": shard_with(nsamples=True),
    "negative count": shard_with(nsamples=-6),
    "count of 30 digits": shard_with(nsamples=10**30),
    "count that is NaN": shard_with(nsamples=float("nan")),
    "count that is infinite": shard_with(nsamples=float("inf")),
    "size that is a list": shard_with(filesize=[1]),
    "size that is null": shard_with(filesize=None),
    "digest that is short": shard_with(sha256="ab"),
    "digest that is a list": shard_with(sha256=["a"] * 64),
    "splits that are a text": changed(lambda d: d.update(datasets="train")),
    "splits that are null": changed(lambda d: d.update(datasets=None)),
    "no splits": changed(lambda d: d.update(datasets=[])),
    "split that is a number": changed(lambda d: d.update(datasets=[7])),
    "name that is a list": dataset_with(name=["train"]),
    "name that is a path": dataset_with(name="../../untouched"),
    "shards that are null": dataset_with(shardlist=None),
    "shards that are a map": dataset_with(shardlist={"url": "x"}),
    "shard that is a text": dataset_with(shardlist=["train-00000.tar"]),
    "record that is a list": changed(lambda d: d.update(onehour=[1])),
    "another kind": changed(lambda d: d.update(__kind__="other")),
    "deep nesting": replaced(DEEP),
    "number of a million digits": replaced(b'{"datasets": ' + b"9" * 1_000_000 + b"}"),
    "not UTF-8": replaced(b"\xff\xfe{}"),
    "no bytes": replaced(b""),
    "null": replaced(b"null"),
    "folder": replaced(Path.mkdir),
    "named pipe": replaced(os.mkfifo),
    "device without end": replaced(lambda path: path.symlink_to("/dev/zero")),
    "8 GB of nothing": replaced(sparse(b"{", 8 << 30)),
}


@pytest.mark.parametrize("name", INDEX_FILES)
def test_index_file_is_refused(place, data_set, refuse, name):
    INDEX_FILES[name](data_set / "index.json")
    before = outside(place, data_set)
    for command in ("verify", "show"):
        if name == "two equal shards" and command == "verify":
            continue
        said = refuse(command, data_set)
        assert str(data_set) in said and len(said) < 3000
    with pytest.raises(UserError):
        load_split(data_set, "train")
    assert outside(place, data_set) == before


CLASSES: dict[str, Callable[[Path], None]] = {
    "deep nesting": replaced(DEEP),
    "number": replaced(b"7"),
    "null": replaced(b"null"),
    "text": replaced(b'"abc"'),
    "NaN": replaced(b"[NaN, NaN, NaN]"),
    "lists in a list": replaced(b"[[1], [2], [3]]"),
    "empty objects": replaced(b"[{}, {}, {}]"),
    "map with a gap": replaced(b'{"0": "a", "2": "c", "9999999999": "b"}'),
    "no classes": replaced(b"[]"),
    "too few": replaced(b'["a"]'),
    "not UTF-8": replaced(b'["\xff"]'),
    "no bytes": replaced(b""),
    "folder": replaced(Path.mkdir),
    "named pipe": replaced(os.mkfifo),
    "device without end": replaced(lambda path: path.symlink_to("/dev/zero")),
    "8 GB of nothing": replaced(sparse(b"[", 8 << 30)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_file_is_refused(place, data_set, refuse, run, name):
    CLASSES[name](data_set / "classes.json")
    assert "classes.json" in refuse("show", data_set)
    code, said, error = run("verify", data_set)
    assert code == 1 and not error and "problem" in said
    assert "classes.json" in refuse("index", data_set) or name == "too few"


IDX: dict[str, Callable[[bytes], bytes]] = {
    "offset beyond the file": lambda text: text.replace(b"cls 512 ", b"cls 99999999 ", 1),
    "negative offset": lambda text: text.replace(b"cls 512 ", b"cls -512 ", 1),
    "overlapping members": lambda text: text.replace(b"jpg 1536 ", b"jpg 512 ", 1),
    "size beyond the file": lambda text: text.replace(b"cls 512 1 ", b"cls 512 99999999 ", 1),
    "number of a million digits": lambda text: text.replace(b"cls 512 ", b"cls " + b"9" * 1_000_000 + b" ", 1),
    "other digits": lambda text: text.replace(b"cls 512 ", "cls ٥١٢ ".encode(), 1),
    "another key": lambda text: text.replace(b"k00.cls", b"k77.cls", 1),
    "name upwards": lambda text: text.replace(b"k00.cls", b"../k.cls", 1),
    "huge count": lambda text: text.replace(b"v1.2 6", b"v1.2 99999999999999999999", 1),
    "other version": lambda text: text.replace(b"v1.2", b"v9.9", 1),
    "line of 100 MB": lambda text: text + b"x" * 100_000_000,
    "not UTF-8": lambda text: text.replace(b"k00", b"\xff\xff\xff"),
    "no bytes": lambda text: b"",
}


@pytest.mark.parametrize("name", IDX)
def test_idx_is_reported(place, data_set, run, refuse, name):
    path = data_set / "train-00000.idx"
    spoiled = IDX[name](path.read_bytes())
    assert spoiled != path.read_bytes()
    path.write_bytes(spoiled)
    code, said, error = run("verify", data_set)
    assert code == 1 and not error and "problem   train-00000.idx" in said and len(said) < 3000
    assert "train-00000.idx" in refuse("show", data_set)


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def altered(**fields: int) -> Callable[[Path, np.ndarray], None]:
    def apply(path: Path, table: np.ndarray) -> None:
        spoiled = np.array(table)
        for field, value in fields.items():
            spoiled[field][3] = value
        np.save(path, spoiled)

    return apply


def claims_a_terabyte(path: Path, table: np.ndarray) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (1 << 36,)}
        )


TABLES: dict[str, Callable[[Path, np.ndarray], None]] = {
    "pickle": lambda path, _: path.write_bytes(pickle.dumps(Exploit(path.parent / "made"))),
    "array of objects": lambda path, _: np.save(path, np.array([Exploit(path.parent / "made")]), allow_pickle=True),
    "offset beyond the shard": altered(offset=1 << 40),
    "offset that overflows": altered(offset=(1 << 64) - 1),
    "size beyond the shard": altered(size=(1 << 32) - 1),
    "shard that is not there": altered(shard=999),
    "another shard": altered(shard=1),
    "negative label": altered(label=-1),
    "other dtype": lambda path, table: np.save(path, np.zeros(len(table))),
    "one row": lambda path, table: np.save(path, np.array(table[:1])),
    "terabyte": claims_a_terabyte,
    "no bytes": lambda path, _: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", TABLES)
def test_cached_table_is_built_again(data_set, name):
    expected = np.array(load_split(data_set, "train").samples)
    (cached,) = (data_set / ".cache").glob("train-*.npy")
    TABLES[name](cached, expected)
    assert np.array_equal(load_split(data_set, "train").samples, expected)
    assert not (data_set / ".cache" / "made").exists()


@pytest.mark.parametrize("content", [DEEP, b"", b"null", b"[1]", b"\xff", b'{"splits": 7}', b'{"plan": NaN}'])
def test_state_of_an_unfinished_prepare(place, two_splits, run, content):
    """What a killed run left is believed in nothing: it is refused, or written anew."""
    out = place / "out"
    state = out / ".prepare"
    state.mkdir(parents=True)
    for name in ("plan.json", "train-00000.json", "val-00001.json"):
        (state / name).write_bytes(content)
    code, _, error = run("prepare", "imagefolder", two_splits, out)
    assert code in (0, 2) and "Traceback" not in error
    if code == 2:
        assert run("prepare", "imagefolder", two_splits, out, "--overwrite")[0] == 0
    assert run("verify", out, "--decode")[0] == 0


# ---- sources


def class_folder(name: str | bytes, content: bytes | Callable[[Path], None]) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        folder = root / "train" / "cat"
        folder.mkdir(parents=True)
        shutil.copy(root.parent / "real.jpg", folder / "a.jpg")
        write(content, folder / os.fsdecode(name))

    return build


def parquet(**columns: object) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        (root / "data").mkdir()
        pq.write_table(pa.table(columns), root / "data" / "train-00000-of-00001.parquet")

    return build


def parquet_bytes(content: bytes | Callable[[Path], None]) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        (root / "data").mkdir()
        write(content, root / "data" / "train-00000-of-00001.parquet")

    return build


SOURCES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "image without bytes": ("imagefolder", class_folder("b.jpg", b""), "b.jpg"),
    "text as image": ("imagefolder", class_folder("b.jpg", b"hello"), "b.jpg"),
    "image of 8 GB": ("imagefolder", class_folder("b.jpg", sparse(b"\xff\xd8\xff", 8 << 30)), ""),
    "no classes": ("imagefolder", lambda root: None, ""),
    "loop of folders": (
        "imagefolder",
        lambda root: class_folder("b.jpg", lambda p: p.parent.joinpath("loop").symlink_to(p.parent))(root),
        "",
    ),
    "parquet that is text": ("parquet", parquet_bytes(b"hello" * 100), "parquet"),
    "parquet without bytes": ("parquet", parquet_bytes(b""), "parquet"),
    "parquet with a huge footer": ("parquet", parquet_bytes(b"PAR1" + b"x" * 99 + b"\xff\xff\xff\x7fPAR1"), "parquet"),
    "parquet that is a pipe": ("parquet", parquet_bytes(os.mkfifo), ""),
    "parquet with null images": (
        "parquet",
        parquet(image=pa.array([None], pa.struct([("bytes", pa.binary()), ("path", pa.string())])), label=[0]),
        "",
    ),
    "parquet with a negative label": ("parquet", parquet(image=[{"bytes": b"j", "path": "a"}], label=[-1]), ""),
    "parquet with a null label": (
        "parquet",
        parquet(image=[{"bytes": b"j", "path": "a"}], label=pa.array([None], pa.int64())),
        "",
    ),
    "parquet without labels": ("parquet", parquet(image=[{"bytes": b"j", "path": "a"}]), "label"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_source_is_refused(place, refuse, make_image, name):
    source, build, message = SOURCES[name]
    (place / "real.jpg").write_bytes(make_image(0))
    build(place / "input")
    before = outside(place, place / "out")
    said = refuse("prepare", source, place / "input", place / "out")
    assert message in said
    assert outside(place, place / "out") == before
    assert not (place / "out" / "index.json").exists()


def test_folder_with_a_pipe_and_a_device(place, run, make_image):
    """What is no file is no image: it is left out, or refused; never opened."""
    folder = place / "input" / "train" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(make_image(0))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    code, said, error = run("prepare", "imagefolder", place / "input", place / "out")
    assert code == 2 or "1 train images" in said
    assert "Traceback" not in error
