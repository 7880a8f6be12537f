"""Which parquet files below a folder make up which split, by the names that the Hugging Face hub gives them."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from shards.errors import UserError

_SPLIT_WORD = re.compile(
    r"(?<![a-z0-9])(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)|(?P<test>test(?:ing)?|eval(?:uation)?))"
    r"(?![a-z])"
)
"""The words by which the hub itself finds splits (huggingface.co/docs/hub/datasets-file-names-and-splits)."""

_PART = re.compile(r"(?P<name>.*)-(?P<number>\d+)-of-(?P<total>\d+)(?:-[0-9a-f]+)?")
"""``train-00003-of-00294``; older uploads have a hash after it."""

_SHOWN = 5


def find_splits(root: Path) -> dict[str, list[Path]]:
    """Parquet files by split ("train", "val", "test", in this order), each list sorted; or all in "train".

    Args:
        root: one parquet file, or a folder with files such as ``data/train-00000-of-00002.parquet``,
            ``validation/0000.parquet`` or ``part-3.parquet`` in it, at any depth.

    Raises:
        UserError: if there are none, some are missing from a numbered series, some belong to no split, or they
            are several data sets.
    """
    if root.is_file():
        return {"train": [root]}
    if not root.is_dir():
        raise UserError(f"{root}: no such file or folder")
    names = sorted(
        name
        for name in (PurePosixPath(path.relative_to(root).as_posix()) for path in root.rglob("*.parquet"))
        if not any(part.startswith(".") for part in name.parts)  # the hub's own cache beside a download
    )
    if not names:
        raise UserError(
            f"{root}: no parquet files in this folder",
            "Give the folder that a Hugging Face data set was downloaded to, with data/train-….parquet in it.",
        )
    for name in names:
        if not (root / name).is_file():  # opening a named pipe would wait for ever
            raise UserError(f"{root / name}: not a file")
    _check_one_data_set(root, names)
    _check_complete(root, names)
    splits: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    found = {name: _split_of(name) for name in names}
    if not any(found.values()):
        return {"train": [root / name for name in names]}
    for name, split in found.items():
        if split is None:
            raise UserError(
                f"{root / name}: its name says no split, while other names do",
                "Begin it with train-, validation- or test-, or move it out of the folder.",
            )
        splits[split].append(root / name)
    if not splits["train"]:
        raise UserError(f"{root}: has no training split: no parquet file is named train-…", f"There is {names[0]}.")
    return {split: paths for split, paths in splits.items() if paths}


def _split_of(name: PurePosixPath) -> str | None:
    """The split that the file's own name says, else that of the innermost folder that says one."""
    for part in (name.stem, *reversed(name.parts[:-1])):
        match = _SPLIT_WORD.search(part.lower())
        if match:
            return match.lastgroup
    return None


def _check_one_data_set(root: Path, names: list[PurePosixPath]) -> None:
    """Configurations of a hub data set lie side by side; a folder that names a split is part of one."""
    homes: dict[str, PurePosixPath] = {}
    for name in names:
        folders = name.parts[:-1]
        depth = next((i for i, folder in enumerate(folders) if _SPLIT_WORD.search(folder.lower())), len(folders))
        homes.setdefault("/".join(folders[:depth]), name)
    if len(homes) > 1:
        raise UserError(
            f"{root}: holds parquet files of more than one data set",
            *(f"{root / name}" for name in list(homes.values())[:_SHOWN]),
            f"Give one of the folders: {', '.join(str(root / home) for home in list(homes)[:_SHOWN])}",
        )


def _check_complete(root: Path, names: list[PurePosixPath]) -> None:
    """Find a download that is not finished: numbers missing from ``…-00003-of-00294``."""
    series: dict[tuple[str, int], dict[int, PurePosixPath]] = {}
    for name in names:
        match = _PART.fullmatch(name.stem)
        if match:
            parts = series.setdefault((str(name.parent / match["name"]), int(match["total"])), {})
            other = parts.setdefault(int(match["number"]), name)
            if other is not name:
                raise UserError(
                    f"{root / other} and {root / name}: both are part {match['number']} of {match['total']}",
                    "They come from two versions of the data set. Keep those of one version only.",
                )
    for (prefix, total), parts in series.items():
        missing = [number for number in range(min(total, 10**6)) if number not in parts]
        if missing:
            shown = ", ".join(f"{number:05d}" for number in missing[:_SHOWN])
            raise UserError(
                f"{root / prefix}-….parquet: {len(missing):,} of {total:,} files are missing",
                f"Missing: {shown}{' …' if len(missing) > _SHOWN else ''}. Finish the download, then run this again.",
                "To take what is there for the whole split, give the files names without -of-.",
            )
