"""What decides how much time an image costs: the rule by which runs are compared, and one is predicted from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.config import RESOLVED_FILE, Config
from pipeline.identity import differences
from pipeline.record import RunRecord

FACTS = ("model", "precision")
"""Of a run's record, beside its device."""

SECTIONS = ("model", "transform", "mixing", "step")
"""Of the recipe."""


def same_work(record: RunRecord) -> str:
    """Equal for two runs where an image costs the same."""
    facts = {name: record.start.get(name) for name in FACTS}
    sections = _recorded(record) or {}  # a run copied without them: what it recorded decides
    return json.dumps({**facts, "device": device(record), "recipe": sections}, sort_keys=True)


def device(record: RunRecord) -> str | None:
    """What a rank of a run computed on, or None if that was not recorded."""
    name = record.start.get("device")
    return None if name is None else re.sub(r"^\d+ × ", "", str(name))


def warnings(record: RunRecord, config: Config) -> list[str]:
    """Why an image may not cost in a configuration what it cost in a run of the same `FACTS`, a sentence each.

    A configuration has no device: that the run's is the one to be used is for who reads its name to say.
    """
    found = _recorded(record)
    if found is None:
        return [f"there is no {RESOLVED_FILE} in {record.folder}: its {', '.join(SECTIONS)} may have been others"]
    return differences({"recipe": found}, {"recipe": _sections(config.resolved())})


def _recorded(record: RunRecord) -> dict[str, Any] | None:
    try:
        return _sections(json.loads((record.folder / RESOLVED_FILE).read_text("utf-8")))
    except (OSError, ValueError, KeyError):
        return None


def _sections(resolved: Mapping[str, Any]) -> dict[str, Any]:
    return {section: resolved["recipe"].get(section) for section in SECTIONS}
