"""What an update takes on more ranks: communication beside the backward pass, by arithmetic.

The gradients of one update are all-reduced in buckets, each as soon as the backward pass has made the last of it.
Of a bucket of S bytes, over p hosts of l ranks each:

    within a host    (l − 1)·α_l + S/B_l                  to one rank before, and from it after
    ring             2(p − 1)·α + 2(p − 1)/p · S/B        between hosts
    halving-doubling 2⌈log₂ p⌉·α + 2(p − 1)/p · S/B       between hosts (Rabenseifner; Goyal et al. §4)

A host's inner link carries one bucket at a time in either direction, its link to the others one, and the three stages
of different buckets overlap. The update ends when backward and the last bucket have, and waits for the slowest rank:

    seconds = compute + max(0, last bucket − backward) + σ·√(2 ln G)

where the time of each of G ranks has the standard deviation σ. The last term bounds the expected maximum of G normal
times less their mean; it is close for many ranks and too high for few.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from pipeline.batch import Batch
from pipeline.buckets import BUCKET_BYTES, divide

Algorithm = Literal["halving-doubling", "ring"]


@dataclass(frozen=True)
class Link:
    """A connection: `bandwidth` in bytes per second, `latency` in seconds per message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """Where ranks are, and what joins them.

    Attributes:
        ranks_per_host: l.
        link: of a host to the others, all its ranks together.
        local: between the ranks of a host.
        straggler: σ, the standard deviation of a rank's time for an update, in seconds.
        algorithm: of the all-reduce between hosts.
    """

    ranks_per_host: int
    link: Link
    local: Link
    straggler: float = 0.0
    algorithm: Algorithm = "halving-doubling"


@dataclass(frozen=True)
class Gradient:
    """A parameter's gradient: its `bytes`, and the share of the backward pass after which it is `ready` (0 … 1)."""

    bytes: int
    ready: float


@dataclass(frozen=True)
class Bucket:
    """Gradients that are all-reduced together: their `bytes`, and the share of backward after which all are `ready`."""

    bytes: float
    ready: float


@dataclass(frozen=True)
class Step:
    """One micro-batch on one rank that talks to nobody: all its `seconds`, and those of them in `backward`."""

    seconds: float
    backward: float


@dataclass(frozen=True)
class Prediction:
    """An update on so many ranks. Times are in seconds.

    Attributes:
        batch: its sizes.
        compute: of a rank that talks to nobody.
        communication: in which some link is at work, hidden or not.
        exposed: of communication, after the backward pass has ended.
        straggler: waiting for the slowest rank.
    """

    batch: Batch
    compute: float
    communication: float
    exposed: float
    straggler: float

    @property
    def seconds(self) -> float:
        """Of an update."""
        return self.compute + self.exposed + self.straggler

    @property
    def hidden(self) -> float:
        """Of communication, beside the backward pass."""
        return self.communication - self.exposed

    @property
    def images_per_second(self) -> float:
        """Over all ranks."""
        return self.batch.train / self.seconds

    @property
    def efficiency(self) -> float:
        """Images per second and rank, against a rank that talks to nobody."""
        return self.compute / self.seconds


def make_buckets(gradients: Sequence[Gradient], bucket_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Group gradients in the order in which they are all-reduced.

    Args:
        gradients: in the order of the model's parameters; backward makes them in about the reverse.
        bucket_bytes: of a bucket (`buckets.divide`). 0 sends at once what is ready together, which is a layer.
    """
    backwards = gradients[::-1]
    if not bucket_bytes:
        ready = [(share, list(alike)) for share, alike in groupby(backwards, key=lambda gradient: gradient.ready)]
        return [Bucket(sum(gradient.bytes for gradient in alike), share) for share, alike in ready]
    return [
        Bucket(sum(gradient.bytes for gradient in bucket), max(gradient.ready for gradient in bucket))
        for bucket in divide(backwards, bucket_bytes, size=lambda gradient: gradient.bytes)
    ]


def all_reduce_seconds(size: float, hosts: int, link: Link, algorithm: Algorithm) -> float:
    """Seconds of an all-reduce of `size` bytes between hosts."""
    messages = 2 * (hosts - 1) if algorithm == "ring" else 2 * math.ceil(math.log2(hosts))
    return messages * link.latency + 2 * (hosts - 1) / hosts * size / link.bandwidth


def local_seconds(size: float, ranks: int, local: Link) -> float:
    """Seconds to add up `size` bytes of a host's ranks in one of them, or to hand them out again."""
    return (ranks - 1) * local.latency + size / local.bandwidth if ranks > 1 else 0.0


def straggler_seconds(deviation: float, ranks: int) -> float:
    """By how much the slowest of so many ranks is expected to be later than the mean, at most."""
    return deviation * math.sqrt(2 * math.log(ranks))


def communicate(buckets: Sequence[Bucket], cluster: Cluster, world_size: int, backward: float) -> tuple[float, float]:
    """Send the buckets of one update.

    Args:
        buckets: in the order in which they are sent.
        cluster: the links.
        world_size: ranks; the hosts are full but for the last.
        backward: seconds of the backward pass that they become ready in.

    Returns:
        Seconds in which some link is at work; and when the last bucket is everywhere, after backward began.
    """
    hosts, ranks = math.ceil(world_size / cluster.ranks_per_host), min(world_size, cluster.ranks_per_host)
    reduce, hand_out = 0, 1
    # the inner link takes what is there first; of what comes at once, first what has still farther to go
    waiting = [(bucket.ready * backward, reduce, number) for number, bucket in enumerate(buckets)]
    heapq.heapify(waiting)
    local_free = network_free = 0.0
    at_work: list[tuple[float, float]] = []
    while waiting:
        since, stage, number = heapq.heappop(waiting)
        size = buckets[number].bytes
        begin = max(since, local_free)
        local_free = begin + local_seconds(size, ranks, cluster.local)
        at_work.append((begin, local_free))
        if stage == reduce:
            begin = max(local_free, network_free)
            network_free = begin + all_reduce_seconds(size, hosts, cluster.link, cluster.algorithm)
            at_work.append((begin, network_free))
            heapq.heappush(waiting, (network_free, hand_out, number))
    return _union(at_work), max(end for _, end in at_work)


def predict(step: Step, buckets: Sequence[Bucket], cluster: Cluster, batch: Batch) -> Prediction:
    """An update of `batch`. Gradients are sent beside the last backward pass of a rank, of one worker or several."""
    backward = batch.together * step.backward
    communication, done = communicate(buckets, cluster, batch.world_size, backward)
    return Prediction(
        batch,
        compute=batch.accumulation * step.seconds,
        communication=communication,
        exposed=max(0.0, done - backward),
        straggler=straggler_seconds(cluster.straggler, batch.world_size),
    )


def alone(measured: Step, buckets: Sequence[Bucket], cluster: Cluster, world_size: int) -> Step:
    """The step of a rank that talks to nobody, from an update with one micro-batch measured on several ranks."""
    seen = predict(measured, buckets, cluster, Batch(0, 0, 1, world_size))
    return Step(measured.seconds - seen.exposed - seen.straggler, measured.backward)


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    total, until = 0.0, 0.0
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
