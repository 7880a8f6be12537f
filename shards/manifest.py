"""The JSON files of a data set folder: ``index.json``, ``_info.json`` and ``classes.json``.

`index.json` follows wids (``wids-shard-index-v1``), the shard index of the webdataset project, with a sha256 per
shard and a section ``onehour`` that records how the shards were made. `_info.json` is what timm's ``ReaderWds``
reads. All are written in a fixed order and without times, so equal data gives equal bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import write_whole

INDEX_NAME = "index.json"
INFO_NAME = "_info.json"
CLASSES_NAME = "classes.json"
PREPARE_FOLDER = ".prepare"
"""Where an unfinished `shards prepare` keeps its state; gone once `index.json` is written."""

KIND = "wids-shard-index-v1"
_SECTION = "onehour"


@dataclass(frozen=True)
class Shard:
    """One tar of a split, as recorded in `index.json`."""

    path: Path
    samples: int
    size: int
    """Of the tar file, in bytes."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `index.json`."""

    root: Path
    name: str
    splits: dict[str, tuple[Shard, ...]]
    record: dict[str, Any]
    """How the shards were made: source, seed, options. Empty for an index written by another tool."""


def read_manifest(root: Path) -> Manifest:
    """Read `index.json`, checking its form but not the shards.

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
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON: {error}", _rewrite(root)) from error
    try:
        return _parse(root, document)
    except (KeyError, TypeError, ValueError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: {what}", _rewrite(root)) from error


def _parse(root: Path, document: dict[str, Any]) -> Manifest:
    if not isinstance(document, dict) or document.get("__kind__") != KIND:
        raise ValueError(f"is no shard index (__kind__ must be {KIND!r})")
    splits: dict[str, tuple[Shard, ...]] = {}
    for dataset in document["datasets"]:
        if dataset["name"] in splits:
            raise ValueError(f"split {dataset['name']!r} is listed twice")
        splits[dataset["name"]] = tuple(_parse_shard(root, entry) for entry in dataset["shardlist"])
    return Manifest(root, str(document.get("name", root.name)), splits, document.get(_SECTION, {}))


def _parse_shard(root: Path, entry: dict[str, Any]) -> Shard:
    url, samples, size, sha256 = entry["url"], entry["nsamples"], entry["filesize"], entry["sha256"]
    if not isinstance(url, str) or "://" in url or Path(url).is_absolute() or ".." in Path(url).parts:
        raise ValueError(f"shard {url!r} is not a file inside this folder")
    if not (isinstance(samples, int) and samples > 0 and isinstance(size, int) and size > 0):
        raise ValueError(f"shard {url!r}: nsamples and filesize must be positive whole numbers")
    if not isinstance(sha256, str) or len(sha256) != 64:
        raise ValueError(f"shard {url!r}: sha256 must be 64 hexadecimal digits")
    return Shard(root / url, samples, size, sha256)


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
    """Write `_info.json`, then `index.json`, whose presence says that the data set is complete."""
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
        _SECTION: manifest.record,
    }


def _url(root: Path, shard: Shard) -> str:
    return shard.path.relative_to(root).as_posix()


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
        document = json.loads(path.read_bytes())
        if isinstance(document, dict):
            document = [document[str(index)] for index in range(len(document))]
        names = tuple(
            entry if isinstance(entry, str) else str(entry.get("wnid") or entry["name"]) for entry in document
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", mend) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a list of class names, nor a map from class index to name", mend) from error
    if not names:
        raise UserError(f"{path}: lists no classes", mend)
    return names


def write_classes(root: Path, classes: tuple[str, ...], scratch: Path | None = None) -> None:
    """Write `classes.json`: ``[{"wnid": …}]`` for WordNet ids (``n01440764``), ``[{"name": …}]`` otherwise."""
    write_whole(root / CLASSES_NAME, to_json([{_kind_of_name(name): name} for name in classes]), scratch)


def _kind_of_name(name: str) -> str:
    return "wnid" if len(name) == 9 and name[0] == "n" and name[1:].isdigit() else "name"


def to_json(document: Any) -> bytes:
    """The one way this package writes JSON, so that equal content is equal bytes."""
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogateescape")
