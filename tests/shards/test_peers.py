"""The index against the real `wds2idx`, and the readers of other projects on prepared shards.

NVIDIA's tools are not among the dependencies (``pip install nvidia-dali-cuda120``; they run without a GPU), so what
`wds2idx` printed is kept here as text, and compared with the real tool wherever that is installed.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from shards.cli import main
from shards.idx import format_index, index_path, list_samples
from shards.index import Split, load_split

WDS2IDX = os.environ.get("WDS2IDX") or shutil.which("wds2idx")
"""NVIDIA's tool, if it is installed; the variable names one that lives in another environment."""

needs_wds2idx = pytest.mark.skipif(WDS2IDX is None, reason="needs wds2idx, of nvidia-dali-cuda120 or -cuda130")

LONG = "n01440764/" * 20 + "x" * 120

GOLDEN_MEMBERS: list[tuple[str, bytes]] = [
    ("a.jpg", b"j" * 700),
    ("a.cls", b"7"),
    ("a.json", b"{}"),
    ("a.seg.png", b""),
    (".hidden.jpg", b"h"),
    ("train/.hidden", b"h"),
    ("train.d/b.jpg", b"j" * 512),
    ("train.d/b.cls", b"8"),
    ("./c.0.jpg", b"j" * 513),
    ("./c.cls", b"9\n"),
    (f"{LONG}.jpg", b"j"),
    (f"{LONG}.cls", b"10"),
    ("名前:é.jpg", b"j"),
    ("名前:é.cls", b"11"),
    ("a.jpg", b"again"),
    ("empty.", b""),
]
"""Several components, hidden files, folders, dots, a name for PAX, other letters, a key that comes back, no data."""

GOLDEN_TEXT = f"""\
v1.2 7
jpg 1536 700 a.jpg cls 4096 1 a.cls json 6144 2 a.json seg.png 8192 0 a.seg.png
jpg 13824 512 train.d/b.jpg cls 15872 1 train.d/b.cls
0.jpg 17920 513 ./c.0.jpg cls 20480 2 ./c.cls
jpg 22528 1 {LONG}.jpg cls 24576 2 {LONG}.cls
jpg 26624 1 名前:é.jpg cls 28672 2 名前:é.cls
jpg 30720 5 a.jpg
 32768 0 empty.
"""
"""What wds2idx of nvidia-dali-cuda120 2.4.0 wrote for those members in a PAX tar, by both of its ways."""


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT, **fields) -> Path:
    """As other tools write them: by tarfile, with folders, owners and times."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1.5e9, "somebody"
            for field, value in fields.items():
                setattr(info, field, value)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    return path


def index_tar(tar: Path) -> bytes:
    """The content of our ``.idx`` for a tar."""
    return format_index(list_samples(tar))


def wds2idx(tar: Path, with_tar_program: bool = True) -> bytes:
    """What the real tool writes for a tar, from GNU tar's listings or, where it finds no tar, from tarfile."""
    assert WDS2IDX is not None
    out = tar.with_suffix(".peer")
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    if not with_tar_program:
        environment["PATH"] = str(tar.parent / "nowhere")
    subprocess.run([WDS2IDX, tar, out], check=True, capture_output=True, env=environment)
    return out.read_bytes()


def webdataset_shards(folder: Path, make_image: Callable[..., bytes]) -> list[Path]:
    """Shards by webdataset's own writer."""
    import webdataset

    with webdataset.ShardWriter(str(folder / "w-%03d.tar"), maxcount=4, verbose=0) as sink:
        for i in range(10):
            sink.write({"__key__": f"train/s{i:03d}", "jpg": make_image(i), "cls": i % 3, "json": {"number": i}})
    return sorted(folder.glob("w-*.tar"))


def test_what_wds2idx_wrote(tmp_path):
    assert index_tar(write_tar(tmp_path / "golden.tar", GOLDEN_MEMBERS)).decode() == GOLDEN_TEXT


@needs_wds2idx
def test_what_wds2idx_writes(tmp_path, prepared, make_image):
    gnu = tmp_path / "gnu"
    (gnu / "a b").mkdir(parents=True)
    for name in ("a.jpg", "a.cls", "empty.jpg", ".hidden.jpg"):
        (gnu / name).write_bytes(b"" if name == "empty.jpg" else os.urandom(700))
    for format in ("ustar", "pax", "gnu", "v7"):
        options = ["--sort=name", f"--format={format}", "--directory", gnu, "--exclude=a b"]
        subprocess.run(["tar", "--create", "--file", tmp_path / f"gnu-{format}.tar", *options, "."], check=True)
    tars = [shutil.copy(tar, tmp_path) for tar in prepared.glob("*.tar")]
    tars += [*webdataset_shards(tmp_path, make_image), *tmp_path.glob("gnu-*.tar")]
    tars += [write_tar(tmp_path / "golden.tar", GOLDEN_MEMBERS)]
    short = [(name, data) for name, data in GOLDEN_MEMBERS if len(name) < 100]
    tars += [write_tar(tmp_path / "golden-gnu.tar", short, tarfile.GNU_FORMAT)]
    tars += [write_tar(tmp_path / "folders.tar", [("d/", b""), ("d/a.jpg", b"j"), ("d/e/", b""), ("d/a.cls", b"0")])]
    tars += [write_tar(tmp_path / "long-user.tar", short, uname="a user: of 3 words", uid=2**31)]
    assert len(tars) > 20
    for tar in map(Path, tars):
        expected = wds2idx(tar)
        assert index_tar(tar) == expected, tar
        if tar.name != "gnu-v7.tar":  # its members have the old type that the other way takes for no file
            assert wds2idx(tar, with_tar_program=False) == expected, tar


@needs_wds2idx
def test_where_wds2idx_is_wrong(tmp_path):
    """Its offset of a GNU long name is that of the name; a file without extension becomes a sample."""
    tar = write_tar(tmp_path / "long.tar", [(f"{LONG}.jpg", b"content"), ("a.jpg", b"")], tarfile.GNU_FORMAT)
    ours, theirs = (int(index.split()[3]) for index in (index_tar(tar), wds2idx(tar)))
    assert tar.read_bytes()[ours:][:7] == b"content"
    assert tar.read_bytes()[theirs:][:7] == LONG[:7].encode()
    assert index_tar(tar) == wds2idx(tar, with_tar_program=False), "its other way is right"
    members = [("README", b"text"), ("a.jpg", b"j"), ("a.cls", b"0")]
    tar = write_tar(tmp_path / "readme.tar", members, tarfile.USTAR_FORMAT)
    assert index_tar(tar) == b"v1.2 1\njpg 1536 1 a.jpg cls 2560 1 a.cls\n"
    assert wds2idx(tar) == b"v1.2 2\nREADME 512 4 README\njpg 1536 1 a.jpg cls 2560 1 a.cls\n"


# ---- readers of other projects: the same keys, labels and bytes


def by_index(split: Split) -> list[tuple[str, int, bytes]]:
    """(key, label, bytes) of each sample in the order of the tars, read at the offsets of the index."""
    samples = []
    for i, sample in enumerate(split.samples):
        with split.shards[sample["shard"]].path.open("rb") as file:
            file.seek(sample["offset"])
            samples.append((split.key(i), int(sample["label"]), file.read(sample["size"])))
    return samples


@pytest.fixture(params=["prepared", "made by webdataset"])
def shards(request, prepared, make_image, tmp_path) -> Split:
    """Shards prepared here, and shards made elsewhere once they are indexed."""
    if request.param == "prepared":
        return load_split(prepared, "train")
    webdataset_shards(tmp_path, make_image)
    assert main(["index", str(tmp_path), "--workers", "1"]) == 0
    return load_split(tmp_path, "train")


def test_webdataset_reads_the_same(shards):
    import webdataset

    urls = [str(shard.path) for shard in shards.shards]
    assert [
        (sample["__key__"], int(sample["cls"]), sample.get("jpg") or sample["png"])
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ] == by_index(shards)


def test_timm_reads_the_same(shards):
    from timm.data.readers.reader_wds import ReaderWds

    reader = ReaderWds(str(shards.root), split="train", is_training=False)
    assert len(reader) == len(shards)
    expected = [(Image.open(io.BytesIO(data)).convert("RGB").tobytes(), label) for _, label, data in by_index(shards)]
    assert [(image.convert("RGB").tobytes(), label) for image, label in reader] == expected


def test_dali_reads_the_same(shards):
    dali = pytest.importorskip("nvidia.dali", reason="needs nvidia-dali-cuda120 or -cuda130; it runs without a GPU")

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        image, label = dali.fn.readers.webdataset(
            paths=[str(shard.path) for shard in shards.shards],
            index_paths=[str(index_path(shard.path)) for shard in shards.shards],
            ext=["jpg;jpeg;png", "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        return image, label, dali.fn.get_property(image, key="source_info")

    reader = pipeline()
    reader.build()
    found = []
    for _ in range(reader.epoch_size("reader")):
        image, label, source = (output.at(0).tobytes() for output in reader.run())
        # "archive:offset:member"
        found.append((source.decode().rpartition(":")[2].partition(".")[0], int(label), image))
    assert found == by_index(shards)
