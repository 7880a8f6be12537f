"""A configuration file as one JSON object: what it extends and the overrides of the command line merged into it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hjson

from shards.errors import UserError

EXTENDS = "extends"
"""The key by which a file names another, relative to its own folder, that it differs from."""

SWEEP_SUFFIXES = (".yaml", ".yml")
"""Of a sweep's file, which tell it from a configuration, and from a run folder."""


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Read a file, the files that it extends, and the overrides.

    Sections are merged key by key; any other value, a list too, replaces the base's, and null takes the base's away.

    Args:
        path: a JSON file. As in DeepSpeed, comments and trailing commas are fine and duplicate keys are not.
        overrides: `path.to.key=value` each; the value is JSON, or a string if it is not. Here too null takes away.

    Returns:
        The object, without `extends`; and the files that it is made of, the one given last.

    Raises:
        UserError: a file is not there, is not JSON, or extends itself; or an override is not one.
    """
    raw, files = _read_with_bases(path, ())
    for override in overrides:
        _apply_override(raw, override)
    return raw, files


def _read_with_bases(path: Path, derived: tuple[Path, ...]) -> tuple[dict[str, Any], tuple[Path, ...]]:
    raw = _read_one(path, derived)
    base = raw.pop(EXTENDS, None)
    if base is None:
        return raw, (path,)
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: {EXTENDS} must be the name of a file, relative to this one's, not {json.dumps(base)}")
    chain = (*derived, path)
    found = path.parent / base
    if any(found.resolve() == other.resolve() for other in chain):
        circle = " → ".join(str(other) for other in (*chain, found))
        raise UserError(f"{path}: {EXTENDS} leads back to where it came from: {circle}", "One of them must not extend.")
    values, files = _read_with_bases(found, chain)
    return merge(values, raw), (*files, path)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the changes of a file that extends it; neither is touched."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None and key in base:
            del merged[key]
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = merge(base[key], value)
        else:
            merged[key] = value
    return merged


def _read_one(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f'{path}: the key "{key}" appears twice in one object', "Remove one of them.")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.stem, known, n=1)
        mend = [f"Did you mean {path.parent / near[0]}.json?"] if near else []
        wanted = f", which {derived[-1]} {EXTENDS}" if derived else ""
        raise UserError(f"{path}: there is no such configuration file{wanted}", *mend) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration file: {error}") from None
    if path.suffix in SWEEP_SUFFIXES:
        raise UserError(f"{path} is a sweep, not a configuration", f"Train its arms with: onehour sweep {path}")
    try:
        raw = hjson.loads(text, object_pairs_hook=no_duplicates)
    except (hjson.HjsonDecodeError, OverflowError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a configuration is a JSON object, this is a {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key_path, separator, text = override.partition("=")
    if not separator or not key_path:
        raise UserError(
            f"--set {override}: not of the form path.to.key=value", "Example: --set optimizer.params.lr=0.4"
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = key_path.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f'--set {override}: "{parent}" is a value, not a section')
    if value is None and last in section:
        del section[last]  # as in a file that extends another
    else:
        section[last] = value
