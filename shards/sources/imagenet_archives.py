"""ImageNet's official archives: what they are called, and whether a file is the one it should be.

A mistaken archive is found by its first bytes and names, before anything is read from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from shards.errors import UserError
from shards.sources.wordnet import WNID
from shards.tar import Member, scan

OFFICIAL = {
    "train": ("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e"),
    "val": ("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622"),
    "devkit": ("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"),
}
"""File names and MD5s of the archives; ``torchvision.datasets.imagenet.ARCHIVE_META``."""

_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


def find_official(root: Path) -> tuple[Path, Path | None, Path | None]:
    """Training archive, validation archive and devkit (packed or not) in a folder, by their names.

    Raises:
        UserError: if there is no training archive.
    """
    train, val, devkit = (root / name for name, _ in OFFICIAL.values())
    if not train.exists():
        mend = "For folders of images, one per class, use: shards prepare imagefolder ROOT OUT"
        raise UserError(f"{root}: no {train.name} in this folder", "Name the training archive itself.", mend)
    candidates = (devkit, root / devkit.name.partition(".")[0])
    return train, val if val.exists() else None, next((path for path in candidates if path.exists()), None)


def class_tars(train: Path) -> dict[str, Member]:
    """The tars inside the training archive by WNID, sorted.

    Raises:
        UserError: if the file is compressed, damaged, or holds anything else.
    """
    _check_uncompressed(train)
    tars: dict[str, Member] = {}
    for member in scan(train):
        name = member.name.rpartition("/")[2]
        wnid, _, extension = name.partition(".")
        if name.startswith("."):
            continue
        if extension != "tar" or not WNID.fullmatch(wnid):
            raise _not_training_archive(train, member.name)
        if wnid in tars:
            raise UserError(f"{train}: holds {tars[wnid].name} and {member.name}, two tars of one class")
        tars[wnid] = member
    if not tars:
        raise UserError(f"{train}: holds no tars of classes", f"{OFFICIAL['train'][0]} holds n01440764.tar and so on.")
    return dict(sorted(tars.items()))


def _not_training_archive(path: Path, name: str) -> UserError:
    stem = name.rpartition("/")[2]
    if stem.startswith("ILSVRC2012_val_"):
        return UserError(
            f"{path}: holds validation images ({name}), not the training images",
            f"shards prepare imagenet-tar {OFFICIAL['train'][0]} --val {path} --val-labels PATH OUT",
        )
    if stem.startswith("ILSVRC2012_test_"):
        return UserError(f"{path}: holds test images ({name}), which have no labels", "Give the training archive.")
    if WNID.match(stem) or WNID.match(name):
        return UserError(
            f"{path}: holds images ({name}), not one tar per class",
            f"Give {OFFICIAL['train'][0]} as it is; or unpack this tar and use: shards prepare imagefolder",
        )
    return UserError(
        f"{path}: {name} is no tar of a class",
        f"{OFFICIAL['train'][0]} holds n01440764.tar, n01443537.tar and so on, and nothing else.",
    )


def check_val_archive(path: Path) -> None:
    """Find out by its first file whether this is another archive than that of the validation images.

    Raises:
        UserError: saying which one it seems to be.
    """
    _check_uncompressed(path)
    first = next(scan(path), None)
    if first is None:
        raise UserError(f"{path}: holds no images")
    name = first.name.rpartition("/")[2]
    if name.startswith("ILSVRC2012_test_"):
        raise UserError(
            f"{path}: holds test images ({first.name}), which have no labels",
            f"Validation images are in {OFFICIAL['val'][0]}.",
        )
    if name.endswith(".tar"):
        raise UserError(
            f"{path}: holds tars ({first.name}); as the validation archive, it must hold images",
            f"Validation images are in {OFFICIAL['val'][0]}; the training archive comes first.",
        )


def _check_uncompressed(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    try:
        with path.open("rb") as file:
            beginning = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    for magic, name in _COMPRESSIONS.items():
        if beginning.startswith(magic):
            raise UserError(
                f"{path}: compressed with {name}; images are read in place, which needs the plain tar",
                "Uncompress it first. The official archives are plain tars.",
            )


def check_md5(archives: Mapping[str, Path]) -> None:
    """Compare archives with the published MD5s; reads all of them.

    Args:
        archives: by their key in `OFFICIAL`.

    Raises:
        UserError: naming the archive that differs.
    """
    for kind, path in archives.items():
        name, expected = OFFICIAL[kind]
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "md5").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        if found != expected:
            raise UserError(
                f"{path}: MD5 is {found}; {name} has {expected}",
                "Copy or download it again, or leave --md5 out if it is meant to be another file.",
            )
