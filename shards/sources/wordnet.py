"""ImageNet's class ids and what they are called.

A WNID such as ``n01440764`` is a noun of WordNet by its offset there. It stands for a class everywhere, because
names repeat ("crane", "maillot") and numbers depend on who counted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

WNID = re.compile(r"n\d{8}", re.ASCII)
"""Form of a WNID; use `fullmatch`."""

_ILSVRC2012_SHA256 = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
"""Of ILSVRC2012's 1,000 WNIDs, sorted and joined by line feeds (timm's ``imagenet_synsets.txt``)."""


def is_ilsvrc2012(classes: Sequence[str]) -> bool:
    """Whether these are exactly the 1,000 classes of ILSVRC2012, in the order that everybody numbers them by."""
    return hashlib.sha256("\n".join(classes).encode("utf-8", "surrogateescape")).hexdigest() == _ILSVRC2012_SHA256


def look_up_titles(wnids: Sequence[str], known: Mapping[str, str] | None = None) -> tuple[str, ...] | None:
    """What each class is called ("tench, Tinca tinca"), in the order given; "" for those without a name.

    Args:
        wnids: the classes.
        known: names from the data itself, used where timm has none.

    Returns:
        Names as in timm's list of 21,844 synsets; None if no class has one.
    """
    names = {wnid: name for wnid, name in (known or {}).items() if name}
    package = importlib.util.find_spec("timm")  # its import would take seconds
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "data" / "_info" / "imagenet_synset_to_lemma.txt"
        wanted = set(wnids)
        try:
            for line in path.read_text("utf-8").splitlines():
                wnid, _, name = line.partition("\t")
                if wnid in wanted:
                    names[wnid] = name.strip()
        except (OSError, ValueError):
            pass  # a timm of another layout: classes keep their ids, which is all that training needs
    titles = tuple(names.get(wnid, "") for wnid in wnids)
    return titles if any(titles) else None
