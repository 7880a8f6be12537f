"""`shards show`: the contact sheet, and the statistics, against what was put into the shards."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.index import load_split
from shards.sheet import Picture, draw_sheet
from shards.show import show
from shards.survey import exif_orientation

RED = (176, 32, 32)


def encode(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(colour: tuple[int, int, int], width: int = 300, height: int = 200) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def tar_of(path: Path, images: dict[str, bytes], label: bytes | None = b"1") -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            members = [(name, data)] + ([] if label is None else [(f"{name.partition('.')[0]}.cls", label)])
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def odd_tar(tmp_path) -> Path:
    images = {
        "plain.jpg": encode(flat((200, 0, 0))),
        "small.jpg": encode(flat((0, 200, 0), 100, 80)),
        "gray.jpg": encode(flat((9, 9, 9)).convert("L")),
        "cmyk.jpg": encode(flat((9, 9, 9)).convert("CMYK")),
        "scans.jpg": encode(flat((9, 9, 9)), progressive=True),
        "turned.jpg": encode(flat((9, 9, 9)), exif=rotated()),
        "renamed.JPEG": encode(flat((9, 9, 9)), "PNG"),
        "cut.jpg": encode(Image.effect_noise((300, 200), 90))[:3000],
        "empty.jpg": b"",
        "words.jpg": b"no image",
    }
    return tar_of(tmp_path / "odd.tar", images)


def test_what_is_found_in_a_foreign_tar(odd_tar, here, run):
    code, said, error = run("show", odd_tar, "--json")
    assert code == 0 and not error
    report = json.loads(said)
    assert report["sheet"] == "odd.png" and [path.name for path in here.iterdir()] == ["odd.png"]
    assert (report["shards"], report["images"], report["surveyed"]) == (1, 10, 10)
    assert report["kinds"] == {
        "JPEG": 3,
        "gray JPEG": 2,
        "no image": 2,
        "CMYK JPEG": 1,
        "progressive JPEG": 1,
        "PNG": 1,
    }
    assert {finding: found["keys"] for finding, found in report["findings"].items()} == {
        "EXIF orientation other than 1 (left as stored)": ["turned"],
        "PNG under the extension .jpeg": ["renamed"],
        "not an image: the file is empty": ["empty"],
        "not an image by its first bytes": ["words"],
    }
    assert report["width"] == {"min": 100, "median": 300, "mean": (7 * 300 + 100) / 8, "max": 300}
    assert report["short_side"]["min"] == 80 and report["short_side_below_training_size"] == 1.0
    assert report["classes"] == {
        "named": None,
        "present": 1,
        "images_per_class": {"min": 10, "median": 10, "mean": 10, "max": 10},
        "without_label": 0,
    }
    assert report["duplicate_keys"]["count"] == 0
    code, said, _ = run("show", odd_tar)
    assert "odd       1 EXIF orientation" in said and "kinds     3 JPEG (30.0%)" in said and "sheet     odd.png" in said


def test_the_sheet_shows_pictures_as_they_are_stored(tmp_path):
    """Each cell is found at its place: colours, shape without rotation, and red marks on what cannot be decoded."""
    turned = Image.new("RGB", (200, 100), (0, 0, 255))
    pictures = [
        Picture(encode(flat((250, 0, 0)), "PNG"), "first", "a"),
        Picture(encode(turned, exif=rotated()), "turned", "b"),
        Picture(encode(flat((0, 0, 0)))[:400], "cut", "c"),
        Picture(b"", "none", "d", "no image: txt"),
        Picture(encode(Image.new("RGBA", (50, 50), (0, 0, 0, 0)), "PNG"), "clear", "e"),
    ]
    path = tmp_path / "sheet.png"
    draw_sheet(path, "heading", "sub", pictures, len(pictures), 3)
    sheet = np.asarray(Image.open(path)).astype(int)
    assert not list(tmp_path.glob(".*")), "no temporary file is left"
    cells = [(24 + column * 190, 86 + row * 230) for row in range(2) for column in range(3)]

    def cell(number: int) -> np.ndarray:
        left, top = cells[number]
        return sheet[top : top + 176, left : left + 176]

    def share(number: int, colour: tuple[int, int, int]) -> float:
        return float((abs(cell(number) - colour).max(axis=-1) < 12).mean())

    assert share(0, (250, 0, 0)) == pytest.approx(2 / 3, abs=0.02)
    blue = np.argwhere(abs(cell(1) - (0, 0, 254)).max(axis=-1) < 12)
    height, width = np.ptp(blue, axis=0) + 1
    assert (width, height) == (176, 88), "EXIF does not turn it"
    assert share(2, RED) > 0.02 and share(3, RED) > 0.02 and share(0, RED) == share(4, RED) == 0
    assert share(4, (205, 205, 205)) == 1.0, "nothing but the cell is seen through it"


def test_gray_of_16_bits_is_shown_as_training_sees_it(tmp_path, here):
    data = encode(Image.fromarray(np.full((50, 50), 30_000, np.uint16)), "PNG")
    draw_sheet(tmp_path / "sheet.png", "heading", "sub", [Picture(data, "deep", "a")], 1, 1)
    assert (np.asarray(Image.open(tmp_path / "sheet.png"))[86:262, 24:200] == 255).all()
    finding = "gray of more than 8 bits: training sees it clipped to white"
    assert show(tar_of(tmp_path / "a.tar", {"deep.png": data}))["findings"] == {finding: {"count": 1, "keys": ["deep"]}}


def test_classes_before_the_folder_with_commas_and_repeated(prepared, here, run):
    for options in (("--class", "class_0,class_2"), ("--class", "class_0", "--class", "2")):
        code, said, _ = run("show", *options, prepared)
        assert code == 0 and "40 images" in said


def test_long_and_strange_texts_stay_in_their_cells(tmp_path):
    key = "k" * 3000 + "\n\0"
    draw_sheet(tmp_path / "a.png", "h" * 900, "s", [Picture(encode(flat((0, 0, 0))), "名" * 99, key)], 1, 8)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert (sheet[86:, 24 + 176 :] == 238).all() and (sheet[:, :24] == 238).all() and (sheet[:, -24:] == 238).all()


def test_a_split_is_chosen_from_by_the_seed(prepared, here, run):
    sheets = {}
    for name, options in {"one": (), "same": ("--seed", 0), "other": ("--seed", 1)}.items():
        code, said, _ = run("show", prepared, "--samples", 6, "--columns", 3, "--out", f"{name}.png", *options)
        assert code == 0 and f"sheet     {name}.png" in said
        sheets[name] = (here / f"{name}.png").read_bytes()
    width, height = Image.open(here / "one.png").size
    assert width >= 3 * 176 and 2 * 176 < height < 4 * 176
    pixels = {name: np.asarray(Image.open(io.BytesIO(data)))[86:] for name, data in sheets.items()}
    assert np.array_equal(pixels["one"], pixels["same"]) and not np.array_equal(pixels["one"], pixels["other"])


def test_statistics_of_a_split(prepared, here, run):
    report = show(prepared, split="val")
    assert report["images"] == 21 and report["sheet"] == "out-val.png"
    assert report["classes"]["images_per_class"] == {"min": 7, "median": 7, "mean": 7, "max": 7}
    assert (report["width"]["min"], report["height"]["max"]) == (12, 12)
    sizes = []
    for path in prepared.glob("val-*.tar"):
        with tarfile.open(path) as tar:
            sizes += [member.size for member in tar if not member.name.endswith(".cls")]
    assert report["image_bytes"] == sum(sizes) and report["bytes"]["max"] == max(sizes)
    only = show(prepared, classes=["class_1"])
    assert only["images"] == 20 and only["classes"]["present"] == 1


def test_large_sets_are_sampled_unless_all_are_asked_for(prepared, here, monkeypatch, run):
    monkeypatch.setattr("shards.show.SURVEYED", 10)
    code, said, _ = run("show", prepared)
    assert code == 0 and "from 10 of 60 images; --all reads them all" in said
    assert show(prepared)["kinds"] == show(prepared)["kinds"], "the same ones each time"
    code, said, _ = run("show", prepared, "--all", "--workers", 2)
    assert code == 0 and "all headers read" in said
    assert sum(show(prepared, everything=True)["kinds"].values()) == 60


def test_a_tar_of_a_data_set_has_its_class_names(prepared, here, tmp_path, run):
    tar = next(iter(prepared.glob("train-*.tar")))
    split = load_split(prepared, "train")
    (number,) = (number for number, shard in enumerate(split.shards) if shard.path == tar)
    labels = split.samples["label"][split.samples["shard"] == number]
    report = show(tar, classes=[f"class_{labels[0]}"])
    assert report["classes"]["named"] == 3 and report["images"] == (labels == labels[0]).sum()
    alone = shutil.copy(tar, tmp_path / "alone.tar")
    assert show(alone)["classes"]["named"] is None
    report = show(tar_of(tmp_path / "unlabelled.tar", {"a.jpg": encode(flat((0, 0, 0)))}, None))
    assert report["classes"]["without_label"] == 1 and report["classes"]["images_per_class"] is None


def test_repeated_keys_are_named(tmp_path, here, run):
    tar = tar_of(tmp_path / "twice.tar", {"a.jpg": b"", "b.jpg": b"", "a.png": b""})
    assert show(tar)["duplicate_keys"] == {"count": 1, "keys": ["a"]}
    assert "keys      1 repeated: a" in run("show", tar)[1]


def test_refusals(prepared, here, tmp_path, refuse):
    assert "--samples 0" in refuse("show", prepared, "--samples", 0)
    assert "--columns 0" in refuse("show", prepared, "--columns", 0)
    assert "must end in .png" in refuse("show", prepared, "--out", "a.jpg")
    assert "no folder" in refuse("show", prepared, "--out", "absent/a.png")
    (here / "b.png").mkdir()
    assert "b.png" in refuse("show", prepared, "--out", "b.png")
    message = refuse("show", prepared, "--class", "clas_1")
    assert "--class clas_1" in message and "Did you mean" in message and "class_1" in message
    assert "no such images" in refuse("show", prepared, "--class", "77")
    assert "has no split 'test'" in refuse("show", prepared, "--split", "test")
    assert "no splits" in refuse("show", next(iter(prepared.glob("*.tar"))), "--split", "val")
    assert "absent" in refuse("show", tmp_path / "absent")
    assert not list(here.glob("*.jpg"))


def test_orientation_of_damaged_exif():
    whole = encode(flat((0, 0, 0)), exif=rotated())
    assert exif_orientation(whole) == 6
    assert exif_orientation(encode(flat((0, 0, 0)))) is None
    start = whole.index(b"Exif\0\0")
    for position in range(start - 2, start + 40):
        for value in (0, 255):
            damaged = bytearray(whole)
            damaged[position] = value
            assert exif_orientation(bytes(damaged)) in (None, *range(1, 9))
        assert exif_orientation(whole[:position]) in (None, 6)
