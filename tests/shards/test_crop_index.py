"""The crop index beside each shard: its bytes, when it is written and removed, and that damage never shows."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import jpeg
from shards.cache import ShardCache
from shards.crop_index import Counts, crop_index_path, open_index, summarize
from shards.errors import UserError
from shards.files import sha256_file
from shards.index import load_split
from shards.jpeg import EXTENT_DTYPE, Status, Views
from shards.remote import open_remote
from shards.verify import verify
from tests.shards.faulty_server import serve

UNAVAILABLE = "was not built when onehour was installed"

pytestmark = pytest.mark.skipif(jpeg.unavailable() is not None, reason=f"the C extension {jpeg.unavailable()}")

VIEWS = Views(key=7, crop="resized", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), padding=0, flip=True)
SIZE = 48

PHOTOS = {
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "gray": {"mode": "L"},
    "optimized": {"subsampling": 2, "optimize": True, "quality": 95},
    "restart after blocks": {"subsampling": 2, "restart_marker_blocks": 7},
    "restart after rows": {"subsampling": 0, "restart_marker_rows": 1},
    "narrow": {"subsampling": 2, "width": 21},
}
"""Baseline JPEGs."""

ODD = {
    "progressive": {"progressive": True},
    "PNG": {"kind": "PNG"},
    "CMYK": {"mode": "CMYK"},
    "truncated": {"cut": 0.5},
    "text": {"bytes": b"no image at all"},
}
"""What has no entries."""


def photo(seed: int, width: int = 233, height: int = 157, mode: str = "RGB", kind: str = "JPEG", **options) -> bytes:
    """Smooth colours with some noise on them, which compress as photographs do."""
    if "bytes" in options:
        return options["bytes"]
    random = np.random.default_rng(seed)
    colours = random.integers(0, 255, (8, 10, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC), np.float64)
    pixels = np.clip(smooth + random.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)
    cut = options.pop("cut", 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **({"quality": 88} | options if kind == "JPEG" else {}))
    return buffer.getvalue()[: int(cut * buffer.tell())]


def write_shard(write_tar, path: Path, images: list[bytes], first: int = 0) -> Path:
    members = []
    for number, image in enumerate(images, first):
        members += [(f"k{number:03}.cls", b"0"), (f"k{number:03}.jpg", image)]
    return write_tar(path, members)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, write_tar) -> Path:
    """A data set of one shard of photos and one of odd files, with crop indexes; tests must not change it."""
    from shards.cli import main

    root = tmp_path_factory.mktemp("indexed") / "set"
    write_shard(write_tar, root / "train-0.tar", [photo(i, **options) for i, options in enumerate(PHOTOS.values())])
    odd = [photo(50 + i, **options) for i, options in enumerate(ODD.values())]
    write_shard(write_tar, root / "train-1.tar", [*odd, photo(99)], first=100)
    assert main(["index", str(root), "--decode", "--workers", "1"]) == 0
    return root


@pytest.fixture
def copy(indexed, tmp_path) -> Path:
    shutil.copytree(indexed, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def without_extension(monkeypatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(jpeg, "unavailable", lambda: UNAVAILABLE)
    return monkeypatch


def images_of(tar: Path) -> list[bytes]:
    split = load_split(tar.parent, "train")
    data = tar.read_bytes()
    rows = split.samples[split.samples["shard"] == [shard.path for shard in split.shards].index(tar)]
    return [data[row["offset"] : row["offset"] + row["size"]] for row in rows]


def crop_indexes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.cropindex"))}


# ---- the format, read by another reader


def parse(data: bytes) -> tuple[dict, list[tuple[int, bytes]]]:
    """The header, and the offset and bytes of each record, as docs/crop_index.md says."""
    magic, version, spacing, count, size, digest = struct.unpack_from("<8sIIQQ32s", data)
    records = []
    for row in range(count):
        offset, length, zero = struct.unpack_from("<QII", data, 64 + 16 * row)
        assert zero == 0
        records.append((offset, data[offset : offset + length]))
    header = {"magic": magic, "version": version, "spacing": spacing, "size": size, "sha256": digest.hex()}
    return header, records


def test_header_and_records_are_those_of_the_documentation(indexed):
    for tar in sorted(indexed.glob("*.tar")):
        data = crop_index_path(tar).read_bytes()
        header, records = parse(data)
        content = tar.read_bytes()
        assert header == {
            "magic": b"cropidx\n",
            "version": 1,
            "spacing": 48,
            "size": len(content),
            "sha256": sha256_file(tar),
        }
        images = images_of(tar)
        assert len(records) == len(images)
        position = 64 + 16 * len(images)
        for row, ((offset, record), image) in enumerate(zip(records, images, strict=True)):
            assert offset == position and offset % 8 == 0
            position += len(record)
            crc, row_there, size, hash_there, *_ = struct.unpack_from("<IIIIHHBBHII", record)
            assert (crc, row_there) == (zlib.crc32(record[4:]), row)
            assert (size, hash_there) == (len(image), xxh64(image) & 0xFFFFFFFF)
        assert position == len(data), "nothing follows the last record"


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0, from its description."""
    primes = (11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261)
    p1, p2, p3, p4, p5 = primes
    word = (1 << 64) - 1

    def rotate(value: int, bits: int) -> int:
        return (value << bits | value >> (64 - bits)) & word

    def mix(lane: int, value: int) -> int:
        return rotate((lane + value * p2) & word, 31) * p1 & word

    lanes, start = [(p1 + p2) & word, p2, 0, -p1 & word], 0
    while len(data) - start >= 32:
        lanes = [mix(lane, value) for lane, value in zip(lanes, struct.unpack_from("<4Q", data, start), strict=True)]
        start += 32
    result = p5
    if len(data) >= 32:
        result = sum(rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & word
        for lane in lanes:
            result = ((result ^ mix(0, lane)) * p1 + p4) & word
    result = (result + len(data)) & word
    while len(data) - start >= 8:
        result = (rotate(result ^ mix(0, struct.unpack_from("<Q", data, start)[0]), 27) * p1 + p4) & word
        start += 8
    if len(data) - start >= 4:
        result = (rotate(result ^ struct.unpack_from("<I", data, start)[0] * p1 & word, 23) * p2 + p3) & word
        start += 4
    for byte in data[start:]:
        result = rotate(result ^ byte * p5 & word, 11) * p1 & word
    for shift, prime in ((33, p2), (29, p3)):
        result = (result ^ result >> shift) * prime & word
    return result ^ result >> 32


def test_the_hash_is_xxh64():
    """Known answers, of xxhsum."""
    assert xxh64(b"") == 0xEF46DB3751D8E999
    assert xxh64(b"abc") == 0x44BC2CF5AD770999


def scan_start(image: bytes) -> int:
    """Where the entropy-coded data begin: after the marker segments up to SOS."""
    position = 2
    while True:
        marker, length = struct.unpack_from(">HH", image, position)
        position += 2 + length
        if marker == 0xFFDA:
            return position


def test_entries_of_baseline_images(indexed):
    tar = indexed / "train-0.tar"
    _, records = parse(crop_index_path(tar).read_bytes())
    for name, image, (_, record) in zip(PHOTOS, images_of(tar), records, strict=True):
        *_, width, height, kind, components, run, scan, count = struct.unpack_from("<IIIIHHBBHII", record)
        opened = Image.open(io.BytesIO(image))
        assert (width, height) == opened.size and kind == 1, name
        assert components == len(opened.getbands()) and scan == scan_start(image)
        across, down = {"422": (16, 8), "444": (8, 8), "gray": (8, 8), "restart after rows": (8, 8)}.get(name, (16, 16))
        assert run * across == 48
        mcus = -(-width // across)
        assert count == -(-mcus // run) * -(-height // down) + 1 == (len(record) - 32) / 8
        entries = struct.unpack_from(f"<{count}Q", record, 32)
        bits = [entry & (1 << 28) - 1 for entry in entries]
        dc = [[(entry >> 28 + 12 * c & 0xFFF ^ 0x800) - 0x800 for c in range(3)] for entry in entries]
        assert bits == sorted(bits) and bits[0] == 0 and dc[0] == [0, 0, 0]
        end = scan + -(-bits[-1] // 8)
        assert image[end:] == b"\xff\xd9", "the last entry is the end of the scan"
        if name == "restart after rows":
            for row in range(1, -(-height // down)):
                number = row * -(-mcus // run)
                at = scan + bits[number] // 8
                assert image[at - 2 : at] == bytes([0xFF, 0xD0 + (row - 1) % 8]) and bits[number] % 8 == 0
                assert dc[number] == [0, 0, 0]
        # the pixels from the middle of the image on are Pillow's
        left, top = width // 2, height // 3
        status, pixels = jpeg.decode_rectangle(image, left, top, width - left, 40, record, list(PHOTOS).index(name))
        expected = np.asarray(opened.convert("RGB"))[top : top + 40, left:]
        assert status == Status.INDEXED and np.array_equal(pixels, expected), name


def test_odd_files_have_records_without_entries(indexed):
    tar = indexed / "train-1.tar"
    _, records = parse(crop_index_path(tar).read_bytes())
    for name, (_, record) in zip(ODD, records, strict=False):
        assert len(record) == 32 and record[16:] == bytes(16), name
    assert len(records[-1][1]) > 32
    size = crop_index_path(tar).stat().st_size
    assert summarize(tar) == Counts(len(ODD) + 1, 1, size)
    assert summarize(tar.with_name("absent.tar")) is None


def test_size_beside_photographs(indexed):
    images = sum(map(len, images_of(indexed / "train-0.tar")))
    assert (indexed / "train-0.cropindex").stat().st_size < 0.08 * images


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_depend_on_the_shard_alone(indexed, copy, run, workers):
    expected = crop_indexes(indexed)
    assert sorted(expected) == ["train-0.cropindex", "train-1.cropindex"]
    for path in copy.glob("*.cropindex"):
        path.unlink()
    code, said, _ = run("index", copy, "--decode", "--workers", workers)
    images, size = len(PHOTOS) + len(ODD) + 1, sum(map(len, expected.values()))
    assert code == 0 and f"crop index: {len(PHOTOS) + 1} of {images} images, {size / 1e6:,.1f} MB (" in said
    assert "crop index and other files written" in said
    assert crop_indexes(copy) == expected


# ---- damage: the file is refused, or its record is not used


def extents_of(tar: Path, descriptor: int, index_descriptor: int) -> np.ndarray:
    split = load_split(tar.parent, "train")
    samples = split.samples[split.samples["shard"] == 0]
    extents = np.zeros(len(samples), EXTENT_DTYPE)
    extents["offset"], extents["size"], extents["row"] = samples["offset"], samples["size"], np.arange(len(samples))
    extents["descriptor"], extents["index_descriptor"] = descriptor, index_descriptor
    return extents


def decode(extents: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    count = len(extents)
    out, status = np.zeros((count, SIZE, SIZE, 3), np.uint8), np.full(count, -9, np.int32)
    jpeg.decode_files(extents, out, status, VIEWS, np.full(count, epoch), np.arange(count))
    return out, status


def flip_bits(data: bytearray, random: np.random.Generator, low: int, high: int) -> None:
    for bit in random.integers(8 * low, 8 * high, int(random.integers(1, 9))):
        data[bit // 8] ^= 1 << int(bit % 8)


def damaged(kind: str, data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    count = len(PHOTOS)
    changed, records = bytearray(data), 64 + 16 * count
    if kind == "header":
        flip_bits(changed, random, 0, 64)
    elif kind == "directory":
        flip_bits(changed, random, 64, records)
    elif kind == "records":
        flip_bits(changed, random, records, len(data))
    elif kind == "anywhere":
        flip_bits(changed, random, 0, len(data))
    elif kind == "zeros":
        start = int(random.integers(len(data)))
        changed[start : start + 700] = bytes(len(changed[start : start + 700]))
    elif kind == "truncated":
        del changed[int(random.integers(len(data))) :]
    elif kind == "other shard":
        changed = bytearray(other)
    elif kind == "other shard under this header":
        changed[:] = data[:64] + other[64:]
    elif kind == "exchanged":
        first, second = random.choice(count, 2, replace=False)
        a, b = (slice(64 + 16 * int(row), 80 + 16 * int(row)) for row in (first, second))
        changed[a], changed[b] = changed[b], changed[a]
    elif kind == "entry with the right checksum":
        # of a run that ends at a restart marker, nobody knows the predictors: only checksums protect its entry
        row = int(random.choice([n for n, options in enumerate(PHOTOS.values()) if "restart" not in str(options)]))
        offset, size = struct.unpack_from("<QI", data, 64 + 16 * row)
        flip_bits(changed, random, offset + 32, offset + size)
        struct.pack_into("<I", changed, offset, zlib.crc32(changed[offset + 4 : offset + size]))
    elif kind == "record with the right checksum":
        row = int(random.integers(count))
        offset, size = struct.unpack_from("<QI", data, 64 + 16 * row)
        flip_bits(changed, random, offset + 4, offset + 32)
        struct.pack_into("<I", changed, offset, zlib.crc32(changed[offset + 4 : offset + size]))
    return bytes(changed)


DAMAGE = {
    "header": 30,
    "directory": 30,
    "records": 40,
    "anywhere": 30,
    "zeros": 20,
    "truncated": 30,
    "other shard": 1,
    "other shard under this header": 1,
    "exchanged": 20,
    "entry with the right checksum": 50,
    "record with the right checksum": 30,
}


@pytest.fixture(scope="module")
def of_another(tmp_path_factory, write_tar) -> bytes:
    """The crop index of a shard of images of the same shapes."""
    from shards.cli import main

    root = tmp_path_factory.mktemp("another")
    write_shard(
        write_tar, root / "train-0.tar", [photo(200 + i, **options) for i, options in enumerate(PHOTOS.values())]
    )
    assert main(["index", str(root), "--decode", "--workers", "1"]) == 0
    return (root / "train-0.cropindex").read_bytes()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_never_changes_a_pixel(copy, of_another, kind):
    tar, path = copy / "train-0.tar", copy / "train-0.cropindex"
    whole, sha256 = path.read_bytes(), sha256_file(tar)
    _, records = parse(whole)
    random = np.random.default_rng(zlib.crc32(kind.encode()))
    refused = fell_back = 0
    descriptor = os.open(tar, os.O_RDONLY)
    extents = extents_of(tar, descriptor, -1)
    for case in range(DAMAGE[kind]):
        expected, status = decode(extents, epoch=case)
        assert set(status.tolist()) == {Status.PLAIN}
        data = damaged(kind, whole, of_another, random)
        path.write_bytes(data)
        try:
            os.close(open_index(tar, sha256, len(PHOTOS)))
        except UserError as error:
            refused += 1
            assert str(path) in error.headline and f"shards index {copy} --decode" in str(error)
        else:
            assert data[:12] == whole[:12] and data[16:64] == whole[16:64], "only the spacing may differ"
        # the C code stands for itself, whatever the header says
        index = os.open(path, os.O_RDONLY)
        extents["index_descriptor"] = index
        out, status = decode(extents, epoch=case)
        os.close(index)
        extents["index_descriptor"] = -1
        assert np.array_equal(out, expected), (kind, case, status)
        for row, (offset, record) in enumerate(records):
            place = slice(64 + 16 * row, 64 + 16 * row + 12)
            intact = data[place] == whole[place] and data[offset : offset + len(record)] == record
            if intact:
                assert status[row] == Status.INDEXED
            elif "right checksum" in kind:
                assert status[row] in (Status.INDEXED, Status.PLAIN, Status.STALE)  # what the crop needs may be right
            else:
                assert status[row] == Status.STALE, (kind, case, row)
        fell_back += int(np.any(status == Status.STALE))
    os.close(descriptor)
    assert fell_back or kind == "header"
    if kind in ("header", "truncated", "other shard"):
        assert refused == DAMAGE[kind]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is truncated"),
        (lambda data: data[:40], "is truncated"),
        (lambda data: data[:100], "is truncated"),
        (lambda data: data[:-8], "is truncated"),
        (lambda data: data + bytes(8), "is damaged: it has"),
        (lambda data: b"x" + data[1:], "does not begin like a crop index"),
        (lambda data: data[:8] + b"\2" + data[9:], "is of version 2"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "is truncated or damaged"),
        (lambda data: data[:16] + b"\3" + data[17:], "is damaged: it is of 3 images"),
        (lambda data: data[:24] + bytes([data[24] ^ 1]) + data[25:], "is of a tar of "),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "is of another shard"),
    ],
)
def test_refusals_name_the_file_and_the_mend(copy, change, message, run):
    tar, path = copy / "train-0.tar", copy / "train-0.cropindex"
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    with pytest.raises(UserError) as caught:
        open_index(tar, sha256_file(tar), len(PHOTOS))
    assert caught.value.headline.startswith(f"{path}: ") and message in caught.value.headline
    assert f"shards index {copy} --decode" in str(caught.value) and "remove the file" in str(caught.value)
    code, said, _ = run("verify", copy)
    assert code == 1 and f"problem   train-0.cropindex: {caught.value.headline.partition(': ')[2]}" in said
    assert run("index", copy)[0] == 0
    assert path.read_bytes() == whole, "what is wrong never stays"


def test_open_index(copy, tmp_path):
    tar = copy / "train-0.tar"
    descriptor = open_index(tar, sha256_file(tar))
    assert not os.get_inheritable(descriptor)
    assert os.pread(descriptor, 8, 0) == b"cropidx\n"
    os.close(descriptor)
    crop_index_path(tar).unlink()
    assert open_index(tar, sha256_file(tar)) is None
    os.mkfifo(crop_index_path(tar))
    with pytest.raises(UserError, match="not a file"):
        open_index(tar, sha256_file(tar))


# ---- prepare


def test_prepare_writes_them_and_no_crop_index_does_not(prepared, two_splits, tmp_path, run, tree):
    without = {name: digest for name, digest in tree(prepared).items() if not name.endswith(".cropindex")}
    assert len(tree(prepared)) == len(without) + 11
    code, said, _ = run("prepare", "imagefolder", two_splits, tmp_path / "out", "--no-crop-index")
    assert code == 0 and "crop index" not in said
    assert tree(tmp_path / "out") == without, "no other byte depends on it"
    code, said, _ = run("prepare", "imagefolder", two_splits, tmp_path / "out")
    assert code == 0 and "nothing to do" not in said and "crop index: 70 of 81 images" in said
    assert tree(tmp_path / "out") == tree(prepared), "a later run writes what is missing"
    code, said, _ = run("prepare", "imagefolder", two_splits, tmp_path / "out", "--no-crop-index")
    assert code == 0 and "nothing to do" in said
    assert tree(tmp_path / "out") == tree(prepared), "and those that are there stay"


def test_prepare_mends_and_overwriting_removes(prepared, two_splits, tmp_path, run, tree):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (out / "train-00002.cropindex").write_bytes(b"damaged")
    (out / "train-00003.tar").unlink()
    assert run("prepare", "imagefolder", two_splits, out)[0] == 0
    assert tree(out) == tree(prepared)
    (out / "train-00002.cropindex").write_bytes(b"damaged")
    assert run("prepare", "imagefolder", two_splits, out, "--no-crop-index")[0] == 0
    assert not (out / "train-00002.cropindex").exists() and len(crop_indexes(out)) == 10
    assert run("prepare", "imagefolder", two_splits, out, "--overwrite", "--no-crop-index")[0] == 0
    assert not crop_indexes(out)


def test_prepare_does_not_index_a_shard_that_has_changed(prepared, two_splits, tmp_path, run, refuse):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    (out / "train-00002.cropindex").unlink()
    with (out / "train-00002.tar").open("r+b") as file:
        file.seek(3000)
        file.write(b"!")
    message = refuse("prepare", "imagefolder", two_splits, out)
    assert f"{out / 'train-00002.tar'}: is not the shard that index.json describes" in message
    (out / "train-00002.tar").unlink()
    assert run("prepare", "imagefolder", two_splits, out)[0] == 0
    assert crop_indexes(out) == crop_indexes(prepared)


def test_prepare_without_the_extension(prepared, two_splits, tmp_path, run, tree, without_extension):
    code, said, _ = run("prepare", "imagefolder", two_splits, tmp_path / "out")
    assert code == 0 and "note      no crop index: the C extension was not built" in said
    assert not crop_indexes(tmp_path / "out")
    code, said, _ = run("prepare", "imagefolder", two_splits, tmp_path / "out")
    assert code == 0 and "nothing to do" in said
    without_extension.undo()
    assert run("prepare", "imagefolder", two_splits, tmp_path / "out")[0] == 0
    assert tree(tmp_path / "out") == tree(prepared)


# ---- index


def test_plain_index_adds_none_and_keeps_those_that_fit(copy, run):
    (copy / "train-1.cropindex").unlink()
    before = (copy / "train-0.cropindex").stat().st_mtime_ns
    code, said, _ = run("index", copy)
    assert code == 0 and f"crop index: {len(PHOTOS)} of {len(PHOTOS) + len(ODD) + 1} images" in said
    assert list(crop_indexes(copy)) == ["train-0.cropindex"]
    assert (copy / "train-0.cropindex").stat().st_mtime_ns == before
    code, said, _ = run("verify", copy)
    assert code == 0 and "remark    1 of 2 shards have no .cropindex: train-1.cropindex" in said


@pytest.mark.parametrize("available", [True, False])
def test_a_changed_shard_has_no_stale_crop_index(copy, run, write_tar, monkeypatch, available):
    if not available:
        monkeypatch.setattr(jpeg, "unavailable", lambda: UNAVAILABLE)
    earlier = crop_indexes(copy)
    write_shard(write_tar, copy / "train-0.tar", [photo(300 + i) for i in range(3)])
    code, said, _ = run("index", copy)
    assert code == 0
    now = crop_indexes(copy)
    assert now["train-1.cropindex"] == earlier["train-1.cropindex"]
    if available:
        assert now["train-0.cropindex"] != earlier["train-0.cropindex"]
        assert summarize(copy / "train-0.tar").indexed == 3
    else:
        assert "train-0.cropindex" not in now
        assert f"note      removed 1 crop index of other shards: the C extension {UNAVAILABLE}" in said
    assert verify(copy, workers=1).problems == ()


def test_index_with_decode_takes_the_extension(copy, refuse, without_extension):
    before = crop_indexes(copy)
    for arguments in ((copy,), ("https://host/train-0.tar", copy / "out")):
        message = refuse("index", *arguments, "--decode")
        assert "--decode: a crop index takes the C extension, which was not built" in message
        assert "apt install gcc python3-dev" in message and "./run.sh setup" in message
    assert crop_indexes(copy) == before


# ---- verify


def test_verify_compares_records_with_the_images(copy, run):
    path = copy / "train-0.cropindex"
    whole = path.read_bytes()
    assert run("verify", copy)[0] == 0
    offset, size = struct.unpack_from("<QI", whole, 64 + 16 * 2)
    changed = bytearray(whole)
    changed[offset + 40] ^= 1
    path.write_bytes(changed)
    code, said, _ = run("verify", copy)
    assert code == 1 and "problem   train-0.cropindex: its record of image 2 is damaged" in said
    struct.pack_into("<I", changed, offset, zlib.crc32(changed[offset + 4 : offset + size]))
    path.write_bytes(changed)
    assert run("verify", copy)[0] == 0, "it is whole and of this image; only a decoding tells"
    problems = [str(problem) for problem in verify(copy, decode=True, workers=1).problems]
    assert "train-0.cropindex: its record of image 2 is not the one that the image calls for" in problems
    exchanged = bytearray(whole)
    exchanged[64:80] = whole[80:96]
    path.write_bytes(exchanged)
    assert "its directory does not describe its records" in run("verify", copy)[1]


def test_verify_says_nothing_where_there_is_none(copy, run, without_extension):
    assert run("verify", copy)[0] == 0, "checked without the extension"
    for path in copy.glob("*.cropindex"):
        path.unlink()
    code, said, _ = run("verify", copy)
    assert code == 0 and "remark" not in said
    (copy / "train-0.cropindex").mkdir()
    assert "problem   train-0.cropindex: cannot be read: not a file" in run("verify", copy)[1]


def test_an_image_that_was_changed_in_place_is_not_decoded_by_its_record():
    """Equal sizes, headers and bit positions: only a checksum of the image tells the two apart."""
    contents = []
    for gray in (60, 61):
        content = io.BytesIO()
        Image.new("RGB", (200, 150), (gray,) * 3).save(content, "JPEG", quality=90, subsampling=0)
        contents.append(content.getvalue())
    one, other = contents
    assert len(one) == len(other)
    status, pixels = jpeg.decode_rectangle(other, 100, 80, 50, 50, jpeg.index_image(one))
    assert status is Status.STALE and pixels is None
    out, plain = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8)
    assert jpeg.evaluate_bytes(other, out, 16, jpeg.index_image(one)) is Status.STALE
    assert jpeg.evaluate_bytes(other, plain, 16) is Status.PLAIN
    assert np.array_equal(out, plain) and out[0, 0, 0] == 61


# ---- the cache of remote shards


def test_they_are_made_in_the_cache(indexed, tmp_path, monkeypatch):
    with serve(indexed) as server:
        split = open_remote(server.url, "train", tmp_path / "cache")
        cache = ShardCache(tmp_path / "cache", 10_000_000)
        expected = (indexed / "train-0.cropindex").read_bytes()
        path = crop_index_path(split.shards[0].path)
        with monkeypatch.context() as context:
            context.setattr(jpeg, "unavailable", lambda: UNAVAILABLE)
            split.pin(cache, 0).close()
            assert not path.exists()
        split.pin(cache, 0).close()
        assert path.read_bytes() == expected, "of a shard that came when there was no extension"
        split.pin(cache, 1).close()
        assert crop_index_path(split.shards[1].path).read_bytes() == (indexed / "train-1.cropindex").read_bytes()
        for damage in (b"", expected[:-8], expected[:40] + b"x" * 32 + expected[72:]):
            path.write_bytes(damage)
            split.pin(cache, 0).close()
            assert path.read_bytes() == expected
        path.write_bytes(b"")
        with monkeypatch.context() as context:
            context.setattr(jpeg, "unavailable", lambda: UNAVAILABLE)
            split.pin(cache, 0).close()
        assert not path.exists(), "nobody could use it"
        path.mkdir()  # cannot be written: nothing ends for that
        split.pin(cache, 0).close()
        assert server.traffic["train-0.tar"].requests == 1


def test_indexing_remote_shards_makes_them(indexed, tmp_path, run, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with serve(indexed) as server:
        code, said, _ = run("index", server.url, tmp_path / "out", "--cache", tmp_path / "cache", "--decode")
    assert code == 0 and f"crop index: {len(PHOTOS) + 1} of {len(PHOTOS) + len(ODD) + 1} images" in said
    assert sorted(crop_indexes(tmp_path / "cache").values()) == sorted(crop_indexes(indexed).values())
    digests = {
        shard["sha256"]
        for shard in json.loads((tmp_path / "out" / "index.json").read_bytes())["datasets"][0]["shardlist"]
    }
    assert {path.stem for path in (tmp_path / "cache").glob("*.cropindex")} == digests
