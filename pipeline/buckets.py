"""Which gradients are all-reduced together: the rule of the trainer (`overlap`), and of its prediction (`scaling`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

BUCKET_BYTES = 8 * 2**20
"""Small enough for little to be left when the backward pass ends, and large enough for its latency not to matter."""

Item = TypeVar("Item")


def divide(
    items: Iterable[Item],
    bucket_bytes: int,
    size: Callable[[Item], int],
    kind: Callable[[Item], Hashable] = lambda item: None,
) -> list[list[Item]]:
    """Put neighbours of one kind together, as long as they have no more than a number of bytes.

    Args:
        items: in the order in which their gradients are expected.
        bucket_bytes: of a bucket; an item that is larger has one of its own.
        size: bytes of an item.
        kind: what the items of a bucket must have in common.
    """
    buckets: list[list[Item]] = []
    room = 0
    for item in items:
        if not buckets or kind(buckets[-1][0]) != kind(item) or size(item) > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(item)
        room -= size(item)
    return buckets
