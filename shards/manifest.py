"""The JSON files of a data set folder: ``index.json``, ``_info.json`` and ``classes.json``.

`index.json` follows wids (``wids-shard-index-v1``), the shard index of the webdataset project, with a sha256 per
shard and a section ``onehour`` that records how the shards were made. `_info.json` is what timm's ``ReaderWds``
reads. All are written in a fixed order and without times, so equal data gives equal bytes.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.fetch import is_remote
from shards.files import read_file, write_whole

INDEX_NAME = "index.json"
INFO_NAME = "_info.json"
CLASSES_NAME = "classes.json"
PREPARE_FOLDER = ".prepare"
"""Where an unfinished `shards prepare` keeps its state; gone once `index.json` is written."""

KIND = "wids-shard-index-v1"
RECORD_SECTION = "onehour"


@dataclass(frozen=True)
class Shard:
    """One tar of a split, as recorded in `index.json`."""

    path: Path
    samples: int
    size: int
    """Of the tar file, in bytes."""
    sha256: str
    url: str | None = None
    """Where the tar comes from, if it is not a file of the data set folder: see `shards.remote`."""


@dataclass(frozen=True)
class Manifest:
    """The content of `index.json`."""

    root: Path
    name: str
    splits: dict[str, tuple[Shard, ...]]
    record: dict[str, Any]
    """How the shards were made: source, seed, options. Empty for an index written by another tool."""

    @property
    def is_remote(self) -> bool:
        """Whether a shard lies elsewhere than in the data set folder."""
        return any(shard.url is not None for shards in self.splits.values() for shard in shards)


def read_manifest(root: Path, *, remote: bool = False) -> Manifest:
    """Read `index.json`, checking its form but not the shards.

    Args:
        root: data set folder.
        remote: allow an index that lists shards at URLs.

    Raises:
        UserError: if the folder or the file is missing or not what it should be, with the command that mends it.
    """
    path = root / INDEX_NAME
    if not root.is_dir():
        raise UserError(
            f"{root}: {'not a folder' if root.exists() else 'no such folder'}",
            "A data set is a folder of tar shards, made by: shards prepare SOURCE OUT",
        )
    if not path.exists():
        raise UserError(*_without_index(root))
    try:
        document = json.loads(read_file(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON: {error}", _rewrite(root)) from error
    manifest = parse_manifest(document, root, str(path), _rewrite(root))
    if manifest.is_remote and not remote:
        raise UserError(
            f"{path}: lists shards at URLs, this needs them as files",
            "Copy the shards here and run: shards index FOLDER. Training takes the index as it is: recipe.data.",
        )
    return manifest


def parse_manifest(document: Any, root: Path, place: str, mend: str) -> Manifest:
    """Check the content of `index.json` and bring it into form; `place` and `mend` begin and end errors.

    Raises:
        UserError: if it is not what it should be.
    """
    try:
        return _parse(root, document)
    except (KeyError, TypeError, ValueError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{place}: {what}", mend) from error


def _parse(root: Path, document: Any) -> Manifest:
    if not isinstance(document, dict) or document.get("__kind__") != KIND:
        raise ValueError(f"is no shard index (__kind__ must be {KIND!r})")
    splits: dict[str, tuple[Shard, ...]] = {}
    for dataset in document["datasets"]:
        if dataset["name"] in splits:
            raise ValueError(f"split {dataset['name']!r} is listed twice")
        if not isinstance(dataset["name"], str) or not _is_inside(dataset["name"]) or "/" in dataset["name"]:
            raise ValueError(f"{dataset['name']!r} is no name for a split")
        splits[dataset["name"]] = tuple(_parse_shard(root, entry) for entry in dataset["shardlist"])
    if not splits:
        raise ValueError("lists no splits")
    record = document.get(RECORD_SECTION, {})
    if not isinstance(record, dict):
        raise ValueError(f"section {RECORD_SECTION!r} is no record of how the shards were made")
    return Manifest(root, str(document.get("name", root.name)), splits, record)


def _parse_shard(root: Path, entry: dict[str, Any]) -> Shard:
    url, samples, size, sha256 = entry["url"], entry["nsamples"], entry["filesize"], entry["sha256"]
    if isinstance(url, str) and url.startswith("pipe:"):
        raise ValueError(f"shard {url!r} is a command, not a file: it cannot be read by index")
    remote = isinstance(url, str) and is_remote(url)
    if not isinstance(url, str) or not (remote or _is_inside(url)):
        raise ValueError(f"shard {url!r} is not a file inside this folder, nor a URL")
    if not all(type(number) is int and 0 < number < 2**63 for number in (samples, size)):  # True is an int too
        raise ValueError(f"shard {url!r}: nsamples and filesize must be positive whole numbers")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"shard {url!r}: sha256 must be 64 hexadecimal digits")
    sha256 = sha256.lower()
    if remote:
        return Shard(root / f"{sha256}.tar", samples, size, sha256, url)
    return Shard(root / url, samples, size, sha256)


def _is_inside(name: str) -> bool:
    """Whether it is a relative path that stays in the folder and that a file can have."""
    os.fsencode(name)  # raises ValueError for what no file can be called
    path = Path(name)
    return bool(path.name) and not (path.is_absolute() or ".." in path.parts or "://" in name or "\0" in name)


def _without_index(root: Path) -> tuple[str, str]:
    if (root / PREPARE_FOLDER).is_dir():
        mend = "An interrupted shards prepare left it so: run the same command again, it goes on from there."
    elif any(root.glob("*.tar")):
        mend = f"There are tars: index them with: shards index {root}"
    else:
        mend = f"There are no tars here either. Make some with: shards prepare SOURCE {root}"
    return f"{root}: no {INDEX_NAME} in this folder", mend


def _rewrite(root: Path) -> str:
    return f"Write it again from the tars: shards index {root}"


def write_manifest(manifest: Manifest, scratch: Path | None = None) -> None:
    """Write `_info.json`, then `index.json`, whose presence says that the data set is complete.

    An `_info.json` that is there and says the same stays: that of timm's own data sets calls the validation split
    differently, and may say more.
    """
    if not manifest.is_remote and info_faults(manifest):  # timm takes every name for a file of the folder
        write_whole(manifest.root / INFO_NAME, to_json(timm_info(manifest)), scratch)
    write_whole(manifest.root / INDEX_NAME, to_json(_index_document(manifest)), scratch)


def timm_info(manifest: Manifest) -> dict[str, Any]:
    """The content of `_info.json`, as timm's ``ReaderWds`` expects it."""
    return {
        "splits": {
            name: {
                "name": name,
                "filenames": [_url(manifest.root, shard) for shard in shards],
                "shard_lengths": [shard.samples for shard in shards],
                "num_samples": sum(shard.samples for shard in shards),
            }
            for name, shards in manifest.splits.items()
        }
    }


def info_faults(manifest: Manifest) -> list[str]:
    """What the `_info.json` that is there says differently from an index; empty if both agree.

    Splits may have other names there, and shards may be in further splits.
    """
    path = manifest.root / INFO_NAME
    try:
        splits = json.loads(read_file(path))["splits"].values()
        listed = [dict(zip(split["filenames"], split["shard_lengths"], strict=True)) for split in splits]
        whole = all(split["num_samples"] == sum(split["shard_lengths"]) for split in splits)
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ["is not what timm's ReaderWds reads"]
    ours = [{_url(manifest.root, shard): shard.samples for shard in shards} for shards in manifest.splits.values()]
    theirs = {name: count for split in listed for name, count in split.items()}
    counts = {name: count for split in ours for name, count in split.items()}
    faults = [
        f"says {theirs[name]!r} samples in {name}, which holds {counts[name]:,}"
        for name in counts
        if name in theirs and theirs[name] != counts[name]
    ]
    for what, names in (
        ("does not list", [name for name in counts if name not in theirs]),
        ("lists shards that are not there:", [name for name in theirs if name not in counts]),
    ):
        if names:
            faults.append(f"{what} {names[0]}" + (f" and {len(names) - 1:,} more" if len(names) > 1 else ""))
    if not faults and not (whole and all(split in listed for split in ours)):
        faults.append("groups the shards into other splits, or sums them up wrongly")
    return faults


def _index_document(manifest: Manifest) -> dict[str, Any]:
    return {
        "__kind__": KIND,
        "wids_version": 1,
        "name": manifest.name,
        "datasets": [
            {
                "name": name,
                "shardlist": [
                    {
                        "url": _url(manifest.root, shard),
                        "nsamples": shard.samples,
                        "filesize": shard.size,
                        "sha256": shard.sha256,
                    }
                    for shard in shards
                ],
            }
            for name, shards in manifest.splits.items()
        ],
        RECORD_SECTION: manifest.record,
    }


def _url(root: Path, shard: Shard) -> str:
    return shard.url or shard.path.relative_to(root).as_posix()


def read_classes(root: Path) -> tuple[str, ...]:
    """Class names in label order, from `classes.json`: a list, or a map from index, of names or of objects.

    Of an object the WordNet id (``wnid``) is taken, else its ``name``: ImageNet's names repeat ("crane").

    Raises:
        UserError: if the file is missing or not of this form.
    """
    return parse_classes(root / CLASSES_NAME, f"Write it with: shards index {root} --classes FILE|N")


def parse_classes(path: Path, mend: str) -> tuple[str, ...]:
    """`read_classes` for a file of any name; `mend` is the advice that errors end with."""
    try:
        document = json.loads(read_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", mend) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON: {error}", mend) from error
    return class_names(document, str(path), mend)


def class_names(document: Any, place: str, mend: str) -> tuple[str, ...]:
    """`read_classes` for a document that has been read; `place` is what errors begin with, `mend` how they end."""
    try:
        if isinstance(document, dict):
            document = [document[str(index)] for index in range(len(document))]
        if not isinstance(document, list):
            raise TypeError
        names = tuple(
            entry if isinstance(entry, str) else str(entry.get("wnid") or entry["name"]) for entry in document
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: is not a list of class names, nor a map from class index to name", mend) from error
    if not names:
        raise UserError(f"{place}: lists no classes", mend)
    return names


def write_classes(
    root: Path, classes: tuple[str, ...], titles: tuple[str, ...] | None = None, scratch: Path | None = None
) -> None:
    """Write `classes.json`: ``[{"wnid": …, "name": …}]`` for WordNet ids, ``[{"name": …}]`` otherwise.

    Args:
        root: folder of the data set.
        classes: names in label order; those of the form ``n01440764`` are WordNet ids.
        titles: what a person calls each WordNet id; "" for those without a name.
        scratch: folder for the temporary file.
    """
    entries = [_describe_class(name, title) for name, title in zip(classes, titles or [""] * len(classes), strict=True)]
    write_whole(root / CLASSES_NAME, to_json(entries), scratch)


def _describe_class(name: str, title: str) -> dict[str, str]:
    if not (len(name) == 9 and name[0] == "n" and name[1:].isdigit()):
        return {"name": name}
    return {"wnid": name, "name": title} if title else {"wnid": name}


def to_json(document: Any) -> bytes:
    """The one way this package writes JSON, so that equal content is equal bytes."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")
