"""Options of `shards prepare`: which classes, which images, and when bytes are encoded anew."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from shards.errors import UserError
from shards.images import describe_image
from shards.index import load_split
from shards.plan import other_plan
from shards.select import select
from shards.tally import MOST_LISTED, Tally

CLASSES = ("cat", "dog", "lion", "wolf")


def photo(number: int, width: int = 60, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Smooth, as photographs are: what JPEG does to it stays small."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 120 * np.sin((x * (c + 1) + y * (number % 5 + 1)) / 23 + number) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)).convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def animals(tmp_path_factory) -> Path:
    """4 classes × (12 training + 3 validation) images."""
    root = tmp_path_factory.mktemp("animals")
    for c, name in enumerate(CLASSES):
        for split, count in (("train", 12), ("val", 3)):
            for i in range(count):
                write(root / split / name, f"{i:02d}.jpg", encode(photo(100 * c + i + (split == "val") * 50)))
    return root


def contents(out: Path, split: str = "train") -> dict[str, tuple[int, str, bytes]]:
    """Label, extension and bytes of each image by key, through `tarfile`."""
    labels: dict[str, int] = {}
    images: dict[str, tuple[str, bytes]] = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                data = tar.extractfile(member).read()
                if extension == "cls":
                    labels[key] = int(data)
                else:
                    images[key] = (extension, data)
    assert labels.keys() == images.keys()
    return {key: (labels[key], *images[key]) for key in images}


def class_names(out: Path) -> list[str]:
    return [entry["name"] for entry in json.loads((out / "classes.json").read_bytes())]


def by_class(out: Path, split: str = "train") -> Counter:
    """How many images of each old class (from the key) have each new class."""
    names = class_names(out)
    return Counter((key.partition("_")[0], names[label]) for key, (label, _, _) in contents(out, split).items())


def record(out: Path) -> dict:
    return json.loads((out / "index.json").read_bytes())["onehour"]


def images_record(out: Path, split: str = "train") -> dict:
    return record(out)["images"][split]


# ---- classes


@pytest.mark.parametrize(
    ("name", "text", "names", "where"),
    [
        ("m.json", '{"cat": "feline", "lion": "feline", "wolf": "canine", "dog": "canine"}', "canine feline", "fcfc"),
        ("m.yaml", "cat: feline\nlion: feline\nwolf: canine\ndog: canine\n", "canine feline", "fcfc"),
        ("m.yaml", "cat: 'no'\nlion: 007\nwolf: 1e3\ndog: yes\n", "007 1e3 no yes", "ny01"),
        ("m.yaml", "- [cat, feline]\n- [dog, canine]\n- [lion, feline]\n- [wolf, canine]", "feline canine", "fcfc"),
        ("m.json", '[["wolf", "z"], ["dog", "a"], ["*", null]]', "z a", "-a-z"),
        ("m.txt", "# two columns\ncat feline\n\nlion\tfeline\nwolf canine\ndog -\n", "feline canine", "f-fc"),
        ("m.json", '{"cat": null, "dog": null, "lion": "big cat", "wolf": "wolf"}', "big cat,wolf", "--bw"),
        ("m.yml", "cat: ~\n'*': rest\n", "rest", "-rrr"),
        ("m.yml", "cat: tiger\n'*': '*'\n", "dog lion tiger wolf", "tdlw"),
        ("m.yml", "cat: '*'\n'*': null\n", "cat", "c---"),
    ],
)
def test_class_map(animals, tmp_path, run, name, text, names, where):
    (tmp_path / name).write_text(text, "utf-8")
    out = tmp_path / "out"
    assert run("prepare", "imagefolder", animals, out, "--class-map", tmp_path / name)[0] == 0
    expected_names = names.split("," if "," in names else " ")
    assert class_names(out) == expected_names
    target = {old: next((n for n in expected_names if n[0] == c), None) for old, c in zip(CLASSES, where, strict=True)}
    for split, count in (("train", 12), ("val", 3)):
        assert by_class(out, split) == {(old, new): count for old, new in target.items() if new is not None}
    assert record(out)["options"]["class_map"] == {old: new for old, new in target.items() if new != old}
    assert run("verify", out)[0] == 0


@pytest.mark.parametrize(
    ("name", "text", "messages"),
    [
        ("m.yaml", "cat: a\ndgo: b\n'*': c\n", ["no class 'dgo' among the 4 classes", "Near misses: dog"]),
        ("m.yaml", "cat: a\ndog: b\n", ["2 of the source's 4 classes are not listed, 'lion', 'wolf'", "'*'"]),
        ("m.yaml", "cat: a\ncat: b\n'*': c\n", ["class 'cat' is listed twice"]),
        ("m.json", '{"cat": "a", "cat": "b", "*": "c"}', ["class 'cat' is listed twice"]),
        ("m.yaml", "'*': null\n", ["drops every class"]),
        ("m.json", '{"cat": ["a"]}', ["is no pair of class and new name"]),
        ("m.json", '{"cat": ', ["Expecting value"]),
        ("m.json", "[" * 100_000, ["nested too deeply"]),
        ("m.yaml", "[" * 10_000, ["nested too deeply"]),
        ("m.json", "3", ["neither an object nor a list"]),
        ("m.yaml", "cat: [a]\n", ["an entry is no pair"]),
        ("m.yaml", "- cat\n", ["an entry is no pair"]),
        ("m.yaml", "cat: a\n b: : c", ["no valid YAML"]),
        ("m.yaml", "", ["neither a mapping nor a list"]),
        ("m.txt", "# nothing\n", ["lists no classes"]),
        ("m.txt", "cat\n", ["line 'cat' has no second column"]),
        ("m.txt", None, ["cannot be read: No such file"]),
    ],
)
def test_class_map_refused(animals, tmp_path, refuse, name, text, messages):
    if text is not None:
        (tmp_path / name).write_text(text, "utf-8")
    said = refuse("prepare", "imagefolder", animals, tmp_path / "out", "--class-map", tmp_path / name)
    assert f"--class-map {tmp_path / name}: " in said
    for message in messages:
        assert message in said
    assert not list((tmp_path / "out").glob("*.tar"))


def test_every_difference_between_two_class_maps_is_named(animals, tmp_path, run, refuse):
    """Also one that no class shows, as where a limit drops the class as well; but not thousands of them."""
    (tmp_path / "m.json").write_text('{"wolf": null, "*": "*"}')
    options = ("prepare", "imagefolder", animals, tmp_path / "out", "--limit-classes", "2")
    assert run(*options, "--class-map", tmp_path / "m.json")[0] == 0
    assert "options.class_map.wolf: None there, absent asked for" in refuse(*options)
    before, now = ({"class_map": {f"c{i}": new for i in range(1000)}} for new in "ab")
    message = str(other_plan(tmp_path, before, now))
    assert message.count("\n") < 30 and "… and 980 more" in message


@pytest.mark.parametrize(("limit", "names"), [("2", "cat dog"), ("wolf,dog", "dog wolf"), ("FILE", "cat lion")])
def test_limit_classes_renumbers_in_label_order(animals, tmp_path, run, limit, names):
    if limit == "FILE":
        (tmp_path / "chosen.txt").write_text("# of ImageNet-100 fame\nlion\n\ncat\n")
        limit = str(tmp_path / "chosen.txt")
    out = tmp_path / "out"
    code, said, _ = run("prepare", "imagefolder", animals, out, "--limit-classes", limit)
    assert code == 0 and "2 (from 4) classes · 24 train / 6 val images" in said
    assert class_names(out) == names.split()
    assert by_class(out) == {(name, name): 12 for name in names.split()}
    assert {label for label, _, _ in contents(out, "val").values()} == {0, 1}


def test_limit_comes_after_the_map_and_takes_long_lists(tmp_path, run):
    names = [f"n{number:08d}" for number in range(60)]
    for number, name in enumerate(names):
        write(tmp_path / "in" / name, "a.jpg", encode(photo(number, 8, 8)))
    (tmp_path / "m.json").write_text(json.dumps({names[0]: "zebra", "*": "*"}))
    out = tmp_path / "out"
    chosen = ",".join(["zebra", *names[10:50]])
    assert len(chosen) > 255, "longer than any file name"
    code = run(
        "prepare", "imagefolder", tmp_path / "in", out, "--class-map", tmp_path / "m.json", "--limit-classes", chosen
    )[0]
    assert code == 0
    assert load_split(out, "train").classes == (*names[10:50], "zebra")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("5", "there are 4 classes"),
        ("0", "Choose a number from 1 to 4"),
        ("dgo,cat", "Near misses: dog"),
        ("cat,dog,cat", "class 'cat' is named twice"),
        (",", "names no classes"),
        ("no/such/file", "no class 'no/such/file' among the 4 classes"),
    ],
)
def test_limit_classes_refused(animals, tmp_path, refuse, limit, message):
    said = refuse("prepare", "imagefolder", animals, tmp_path / "out", "--limit-classes", limit)
    assert f"--limit-classes {limit}: " in said and message in said


def test_limit_per_class_is_chosen_by_the_seed_and_leaves_validation_whole(animals, tmp_path, run, refuse, tree):
    chosen = {}
    for name, options in (("a", ()), ("b", ("--workers", 2)), ("c", ("--seed", 1))):
        code = run("prepare", "imagefolder", animals, tmp_path / name, "--limit-per-class", 5, *options)[0]
        assert code == 0
        chosen[name] = set(contents(tmp_path / name))
        assert by_class(tmp_path / name) == {(c, c): 5 for c in CLASSES}
        assert len(contents(tmp_path / name, "val")) == 12
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert chosen["a"] != chosen["c"]
    assert run("prepare", "imagefolder", animals, tmp_path / "large", "--limit-per-class", 100)[0] == 0
    assert by_class(tmp_path / "large") == {(c, c): 12 for c in CLASSES}
    said = refuse("prepare", "imagefolder", animals, tmp_path / "a", "--limit-per-class", 6)
    assert "options.limit_per_class: 5 there, 6 asked for" in said
    assert "--limit-per-class 0" in refuse("prepare", "imagefolder", animals, tmp_path / "x", "--limit-per-class", 0)


# ---- odd files: kept and listed, or made ordinary


def flat_png(width: int, height: int) -> bytes:
    """A PNG of any size from its definition: few bytes, many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


CORRUPT_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x30" + b"\xff" * 40


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """One class of 14 images: 6 odd ones and 8 that are not, among them a rotated and a gray one."""
    root = tmp_path_factory.mktemp("mixed")
    exif = Image.Exif()
    exif[0x112] = 6
    files = {
        "png": encode(photo(1), "PNG"),
        "palette": encode(photo(2, mode="P"), "PNG"),
        "cmyk": encode(photo(3, mode="CMYK")),
        "progressive": encode(photo(4), progressive=True),
        "progressive_gray": encode(photo(5, mode="L"), progressive=True),
        "webp": encode(photo(6), "WEBP"),
        "gray": encode(photo(7, mode="L")),
        "rotated": encode(photo(8), exif=exif, comment=b"a comment", icc_profile=b"a profile"),
        "corrupt_exif": encode(photo(9), exif=CORRUPT_EXIF),
    }
    for i in range(5):
        files[f"plain_{i}"] = encode(photo(20 + i))
    for name, data in files.items():
        write(root / "x", f"{name}.JPEG", data)
    return root


ODD = {
    "CMYK JPEG": ["x_cmyk"],
    "PNG": ["x_palette", "x_png"],
    "WEBP": ["x_webp"],
    "progressive JPEG": ["x_progressive"],
    "progressive gray JPEG": ["x_progressive_gray"],
}


def listed(out: Path) -> dict[str, list[str]]:
    return {kind: sorted(s["key"] for s in samples) for kind, samples in images_record(out)["odd"].items()}


def originals(root: Path) -> dict[str, bytes]:
    return {f"x_{path.stem}": path.read_bytes() for path in (root / "x").iterdir()}


def test_odd_files_are_kept_verbatim_and_listed(mixed, tmp_path, run):
    out = tmp_path / "out"
    code, said, _ = run("prepare", "imagefolder", mixed, out, "--shards", 3)
    assert code == 0
    assert "odd files 2 PNG, " in said and "1 CMYK JPEG" in said and "kept verbatim (listed in index.json)" in said
    assert {key: data for key, (_, _, data) in contents(out).items()} == originals(mixed)
    assert images_record(out)["kinds"] == {"JPEG": 7, "gray JPEG": 1, **{kind: len(v) for kind, v in ODD.items()}}
    assert listed(out) == ODD
    for samples in images_record(out)["odd"].values():
        for sample in samples:
            assert sample == {"key": sample["key"], "bytes": len(originals(mixed)[sample["key"]])}


def test_normalize_odd_converts_these_alone_and_exactly(mixed, tmp_path, run):
    out = tmp_path / "out"
    code, said, _ = run("prepare", "imagefolder", mixed, out, "--shards", 3, "--normalize-odd")
    assert code == 0 and "odd files 2 PNG" in said and "encoded   6 images anew" in said
    before = originals(mixed)
    odd = {key for keys in ODD.values() for key in keys}
    for key, (_, extension, data) in contents(out).items():
        assert extension == "jpg"
        if key not in odd:
            assert data == before[key]
            continue
        gray = key == "x_progressive_gray"
        header = describe_image(data)
        assert header.kind == ("gray JPEG" if gray else "JPEG")
        image, original = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(before[key])).convert("RGB")
        assert not image.info.keys() & {"exif", "icc_profile", "comment"}
        assert image.layer[0][1:3] == (1, 1), "chroma at full resolution"
        difference = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(original, int))
        assert difference.mean() < 4
        expected = io.BytesIO()
        (original.convert("L") if gray else original).save(expected, "JPEG", quality=95, subsampling="4:4:4")
        assert data == expected.getvalue()
    stored = {key: len(data) for key, (_, _, data) in contents(out).items()}
    assert listed(out) == ODD
    for samples in images_record(out)["odd"].values():
        for sample in samples:
            key = sample["key"]
            assert (sample["bytes"], sample["stored_bytes"]) == (len(before[key]), stored[key])
    assert images_record(out)["reencoded"] == {
        "images": 6,
        "bytes": sum(len(before[key]) for key in odd),
        "stored_bytes": sum(stored[key] for key in odd),
    }
    options = record(out)["options"]
    assert options["normalize_quality"] == 95 and options["pillow"] == PIL.__version__ and options["libjpeg"]


def test_record_of_odd_files_survives_interruption_and_repair(mixed, tmp_path, run, tree, start):
    options = ("prepare", "imagefolder", mixed, tmp_path / "out", "--shards", 5, "--normalize-odd")
    assert run(*options)[0] == 0
    whole = tree(tmp_path / "out")
    for name in ("train-00001.tar", "train-00004.idx"):
        (tmp_path / "out" / name).unlink()
        code, said, _ = run(*options)
        assert code == 0 and "found     4 of 5" in said and "odd files" in said
        assert tree(tmp_path / "out") == whole


def test_kind_of_most_images_is_counted_and_not_listed(tmp_path, run, write_class_folders):
    write_class_folders(tmp_path / "images" / "train", kind="PNG")
    code, said, _ = run("prepare", "imagefolder", tmp_path / "images", tmp_path / "out")
    assert code == 0 and "kinds     15 PNG\n" in said and "odd files" not in said
    assert images_record(tmp_path / "out") == {"kinds": {"PNG": 15}, "odd": {}}


def test_list_is_bounded_and_does_not_depend_on_the_order_of_shards():
    header = describe_image(encode(photo(1, 8, 8), "PNG"))
    parts = []
    for shard in range(5):
        tally = Tally()
        for i in range(MOST_LISTED // 2 - shard):
            tally.add(f"{shard}-{i}", header, 10, None)
        parts.append(tally.record())
    expected = [sample for part in parts for sample in part["odd"]["PNG"]][:MOST_LISTED]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3, 4, 1, 2, 0]):
        whole = Tally()
        for number in order:
            whole.join(number, json.loads(json.dumps(parts[number])))
        assert whole.record()["odd"]["PNG"] == expected
        assert whole.record()["kinds"] == {"PNG": 5 * (MOST_LISTED // 2) - 10}


# ---- smaller images


def test_resize_short(tmp_path, run, refuse):
    sizes = {"wide": (90, 47), "tall": (50, 91), "edge": (80, 40), "small": (300, 30), "gray": (99, 77)}
    exif = Image.Exif()
    exif[0x112] = 6
    for i, (name, size) in enumerate(sizes.items()):
        image = photo(i, *size, mode="L" if name == "gray" else "RGB")
        write(
            tmp_path / "in" / "x", f"{name}.jpg", encode(image, quality=97, exif=exif, icc_profile=b"p", comment=b"c")
        )
    write(tmp_path / "in" / "x", "large.png", encode(photo(9, 120, 60, "RGBA"), "PNG"))
    write(tmp_path / "in" / "x", "tiff.png", encode(photo(9, 121, 60), "TIFF"))
    write(tmp_path / "in" / "x", "little.png", encode(photo(9, 20, 60), "PNG"))
    out = tmp_path / "out"
    options = ("prepare", "imagefolder", tmp_path / "in", out, "--shards", 2, "--resize-short", 40)
    code, said, _ = run(*options)
    assert code == 0 and "encoded   5 images anew" in said
    before, after = originals(tmp_path / "in"), contents(out)
    for key in ("x_edge", "x_small", "x_little"):
        assert after[key][2] == before[key]
    new_sizes = {"wide": (76, 40), "tall": (40, 72), "gray": (51, 40), "large": (80, 40), "tiff": (80, 40)}
    for name, size in new_sizes.items():
        _, extension, data = after[f"x_{name}"]
        image = Image.open(io.BytesIO(data))
        assert (extension, image.format, image.size) == ("jpg", "JPEG", size)
        assert image.mode == ("L" if name == "gray" else "RGB")
        assert not image.info.keys() & {"exif", "icc_profile", "comment", "progressive"} and not image.getexif()
        original = Image.open(io.BytesIO(before[f"x_{name}"]))
        expected = io.BytesIO()
        pixels = original if original.mode == "L" else original.convert("RGB")
        pixels.resize(size, Image.Resampling.LANCZOS).save(expected, "JPEG", quality=90, comment=b"")
        assert data == expected.getvalue()
    options_record = record(out)["options"]
    assert options_record["resize_short"] == 40 and options_record["resize_quality"] == 90
    assert options_record["pillow"] == PIL.__version__
    assert "options.resize_quality: 90 there, 70 asked for" in refuse(*options, "--quality", 70)
    assert "options.pillow" in refuse(*options[:-2])


def test_resuming_with_another_pillow_is_refused(animals, tmp_path, run, refuse, monkeypatch):
    options = ("prepare", "imagefolder", animals, tmp_path / "out", "--resize-short", 20)
    assert run(*options)[0] == 0
    (tmp_path / "out" / "train-00001.tar").unlink()
    monkeypatch.setattr(PIL, "__version__", "99.0")
    assert f"options.pillow: {Image.__version__} there, 99.0 asked for" in refuse(*options)


def test_bytes_of_encoded_images_do_not_depend_on_workers(mixed, tmp_path, run, tree):
    trees = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        options = ("--resize-short", 24, "--normalize-odd", "--shards", 4, "--workers", workers)
        assert run("prepare", "imagefolder", mixed, out, *options)[0] == 0
        trees.append(tree(out))
    assert trees[0] == trees[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize-short", 0], "--resize-short 0: must be at least 1 pixel"),
        (["--normalize-odd", "--quality", 101], "--quality 101: JPEG qualities go from 1 to 100"),
        (["--quality", 90], "--quality 90: has no effect"),
    ],
)
def test_impossible_encodings(animals, tmp_path, refuse, options, message):
    assert message in refuse("prepare", "imagefolder", animals, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_what_became_of_odd_files_is_not_said_where_some_were_reduced(mixed, tmp_path, run):
    code, said, _ = run("prepare", "imagefolder", mixed, tmp_path / "out", "--resize-short", 20)
    assert code == 0 and "encoded   14 images anew" in said
    assert "odd files 2 PNG" in said and "verbatim" not in said


@pytest.mark.parametrize("kind", ["PNG", "PPM", "TIFF"])
def test_gray_of_16_bits_becomes_gray_of_8(tmp_path, run, kind):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    write(tmp_path / "in" / "x", f"deep.{kind.lower()}", encode(Image.fromarray(values), kind))
    assert run("prepare", "imagefolder", tmp_path / "in", tmp_path / "out", "--normalize-odd")[0] == 0
    image = Image.open(io.BytesIO(contents(tmp_path / "out")["x_deep"][2]))
    assert image.mode == "L" and np.abs(np.asarray(image, int) - values // 257).max() < 5


def test_gray_without_a_known_white_is_refused(tmp_path, refuse):
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    write(tmp_path / "in" / "x", "float.tif", encode(Image.fromarray(values), "TIFF"))
    said = refuse("prepare", "imagefolder", tmp_path / "in", tmp_path / "out", "--normalize-odd")
    assert "float.tif: key x_float: " in said and "8-bit gray" in said


# ---- broken images


def test_without_decoding_only_what_is_no_image_is_refused(tmp_path, run, refuse):
    data = encode(photo(1))
    write(tmp_path / "in" / "x", "cut.jpg", data[: len(data) // 2])
    write(tmp_path / "in" / "x", "whole.jpg", data)
    assert run("prepare", "imagefolder", tmp_path / "in", tmp_path / "out")[0] == 0
    (tmp_path / "in" / "x" / "empty.jpg").touch()
    said = refuse("prepare", "imagefolder", tmp_path / "in", tmp_path / "other")
    assert "x/empty.jpg: key x_empty: not an image: it is empty" in said and "run the same command again" in said


@pytest.mark.parametrize(("option", "workers"), [("--check-decode", 2), ("--resize-short", 1)])
def test_every_broken_image_is_named_at_once(tmp_path, run, refuse, option, workers):
    source, out = tmp_path / "in", tmp_path / "out"
    data = encode(photo(1))
    for i in range(30):
        write(source / "x", f"cut_{i:02d}.jpg", data[: len(data) - 60 - i])
    for i in range(20):
        write(source / "x", f"whole_{i}.jpg", data)
    write(source / "x", "bomb.png", flat_png(20_000, 20_000))
    options = (option, 20) if option == "--resize-short" else (option,)
    command = ("prepare", "imagefolder", source, out, "--samples-per-shard", 10, *options, "--workers", workers)
    said = refuse(*command)
    assert f"31 images are broken; all are listed in {out}/.prepare/broken.txt" in said
    assert said.count("\n") < 30 and "… and 11 more" in said
    lines = (out / ".prepare" / "broken.txt").read_text().splitlines()
    assert len(lines) == 31
    assert any("bomb.png: key x_bomb: " in line and "decompression bomb" in line for line in lines)
    assert all("truncated" in line for line in lines if "cut_" in line)
    assert not (out / "index.json").exists()
    for line in lines:
        Path(line.partition(": key ")[0]).unlink()
    assert run(*command, "--overwrite")[0] == 0
    assert not (out / ".prepare").exists()
    assert len(contents(out)) == 20


def test_shards_of_an_earlier_run_are_decoded_too(tmp_path, run, refuse):
    source, out = tmp_path / "in", tmp_path / "out"
    data = encode(photo(1))
    for i in range(20):
        write(source / "x", f"whole_{i:02d}.jpg", data)
    write(source / "x", "cut.jpg", data[:-60])
    command = ("prepare", "imagefolder", source, out, "--shards", 3)
    (source / "x" / "whole_13.jpg").write_bytes(b"?" * len(data))  # stops the first run after it wrote the other shards
    assert "whole_13.jpg: key x_whole_13: not an image: it begins with b'????" in refuse(*command)
    (source / "x" / "whole_13.jpg").write_bytes(data)
    assert "x_cut: image file is truncated" in refuse(*command, "--check-decode")
    assert run(*command)[0] == 0
    assert len(contents(out)) == 21


def test_image_that_no_jpeg_can_hold_is_named(tmp_path, refuse):
    write(tmp_path / "in" / "x", "long.png", flat_png(70_000, 1))
    write(tmp_path / "in" / "x", "plain.jpg", encode(photo(1)))
    said = refuse("prepare", "imagefolder", tmp_path / "in", tmp_path / "out", "--normalize-odd")
    assert "long.png: key x_long: 70000 × 1 pixels cannot be encoded as JPEG" in said


def test_corrupt_exif_is_neither_an_error_nor_a_message(mixed, tmp_path, start):
    command = ("prepare", "imagefolder", mixed, tmp_path / "out", "--resize-short", 20, "--check-decode")
    process = start(*command, "--workers", 2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "arning" not in said
    data = contents(tmp_path / "out")["x_rotated"][2]
    assert Image.open(io.BytesIO(data)).size == (30, 20), "EXIF's orientation is not applied"


def test_classes_that_share_a_name_stay_apart_and_cannot_be_chosen_by_it():
    assert select(("crane", "ant", "crane")).labels == (0, 1, 2)
    with pytest.raises(UserError, match="2 classes of the source are called 'crane'"):
        select(("crane", "ant", "crane"), limit_classes="2")
