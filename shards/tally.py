"""What the images of a data set are, counted by kind, and the odd ones listed, for index.json.

Most images of a photograph collection are ordinary JPEGs. The few that are not (ImageNet has one PNG and 23 CMYK
files) matter to everybody who decodes them with something faster than Pillow, so they are listed by key.
"""

from __future__ import annotations

from collections import Counter
from operator import itemgetter
from typing import Any

from shards.images import ORDINARY_KINDS, ImageHeader

IMAGES_KEY = "images"
"""Where index.json and the records of finished shards keep it."""

MOST_LISTED = 1000
"""Keys listed of each kind of odd file in a split; all are counted."""


class Tally:
    """Counts by kind, the odd files, and what was encoded anew; of a shard, or of a split as its shards come in."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._odd: dict[str, list[tuple[int, dict[str, Any]]]] = {}  # by kind: (number of the shard, sample)
        self._reencoded: Counter[str] = Counter()

    def add(self, key: str, header: ImageHeader, size: int, stored_size: int | None) -> None:
        """Count one image.

        Args:
            key: of its sample.
            header: of the image as the source has it.
            size: in bytes, in the source.
            stored_size: in bytes, if it was encoded anew.
        """
        kind = header.kind
        self._kinds[kind] += 1
        sample = {"key": key, "bytes": size}
        if stored_size is not None:
            self._reencoded.update(images=1, bytes=size, stored_bytes=stored_size)
            sample["stored_bytes"] = stored_size
        if header.odd:
            listed = self._odd.setdefault(kind, [])
            if len(listed) < MOST_LISTED:
                listed.append((0, sample))

    def join(self, number: int, record: dict[str, Any]) -> None:
        """Add the record of a shard; whatever the order in which shards come, the result is the same.

        Raises:
            KeyError, TypeError, AttributeError: if the record is not of the form that `record` gives.
        """
        self._kinds.update(record["kinds"])
        self._reencoded.update(record["reencoded"])
        for kind, samples in record["odd"].items():
            listed = self._odd.get(kind, []) + [(number, sample) for sample in samples]
            self._odd[kind] = sorted(listed, key=itemgetter(0))[:MOST_LISTED]

    def record(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "kinds": dict(sorted(self._kinds.items())),
            "odd": {kind: [sample for _, sample in listed] for kind, listed in sorted(self._odd.items())},
            "reencoded": dict(sorted(self._reencoded.items())),
        }

    def split_record(self) -> dict[str, Any]:
        """`record` for index.json: a kind that most images are of (PNG, for pixels from arrays) is not listed."""
        record = self.record()
        most = self._kinds.total() / 2
        record["odd"] = {kind: samples for kind, samples in record["odd"].items() if self._kinds[kind] <= most}
        if not record["reencoded"]:
            del record["reencoded"]
        return record


def summary(record: dict[str, dict[str, Any]], normalized: bool) -> list[str]:
    """Lines for the screen about the images of a data set.

    Args:
        record: by split, as in index.json.
        normalized: whether odd files were encoded anew.
    """
    lines = []
    usual: Counter[str] = Counter()  # kinds that fast decoders refuse, but most images of their split are of
    odd: Counter[str] = Counter()
    reencoded: Counter[str] = Counter()
    for split in record.values():
        for kind, count in split["kinds"].items():
            if kind not in ORDINARY_KINDS:
                (odd if kind in split["odd"] else usual)[kind] += count
        reencoded.update(split.get("reencoded", {}))
    if usual:
        lines.append(f"kinds     {_counts(usual)}")
    if odd:
        # of those that were only reduced in size, the listing says which
        fate = " encoded anew" if normalized else "" if reencoded else " kept verbatim"
        lines.append(f"odd files {_counts(odd)}{fate} (listed in index.json)")
    if reencoded:
        lines.append(
            f"encoded   {reencoded['images']:,} images anew, {reencoded['bytes'] / 1e6:,.1f} MB → "
            f"{reencoded['stored_bytes'] / 1e6:,.1f} MB"
        )
    return lines


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
