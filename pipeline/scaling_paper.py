"""Figures 7 and 8 of Goyal et al. 2017 beside what `pipeline.scaling` says of the same machines.

The figures' points are read from the paper's text, which has four of them, rounded as it rounds them. Two numbers of
the paper's cluster are not known and are fitted to these points: with four points and two fitted numbers, agreement
is a fit and no test of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.batch import Batch
from pipeline.scaling import Bucket, Cluster, Gradient, Link, Prediction, Step, alone, make_buckets, predict

IMAGES = 1_281_167
EPOCHS = 90
IMAGES_PER_GPU = 32
GPUS_PER_SERVER = 8
GBIT = 1e9 / 8

GRADIENT_BYTES = 100e6
"""Of ResNet-50 (paper §4)."""
BACKWARD_SECONDS = 0.120
"""Of ResNet-50 with 32 images on a P100 (paper §4)."""
LINE_RATE = 50 * GBIT
"""Of the Ethernet between servers (paper §4)."""

FITTED_BANDWIDTH = 15 * GBIT
"""Fitted: what TCP made of the line rate. It is also the rate that the paper says its all-reduce needs (§4)."""
FITTED_STRAGGLER = 0.009
"""Fitted, given that bandwidth: σ in seconds."""
FITTED = {
    "bandwidth between servers": f"{FITTED_BANDWIDTH / GBIT:g} Gbit/s",
    "straggler σ": f"{1e3 * FITTED_STRAGGLER:g} ms",
}
ASSUMED = {"latency": "50 µs between servers, 5 µs within one", "bandwidth within a server": "80 Gbit/s"}
"""Neither known nor fitted; the points say little about them."""

CLUSTER = Cluster(
    GPUS_PER_SERVER,
    Link(FITTED_BANDWIDTH, 50e-6),
    Link(80 * GBIT, 5e-6),
    FITTED_STRAGGLER,
    "halving-doubling",
)


@dataclass(frozen=True)
class Point:
    """A point of Figure 7: what the paper says of so many `gpus`, and the `seconds` per update that follow from it."""

    gpus: int
    said: str
    seconds: float

    @property
    def minibatch(self) -> int:
        """kn: each GPU has 32 images."""
        return self.gpus * IMAGES_PER_GPU

    @property
    def images_per_second(self) -> float:
        """Figure 8."""
        return self.minibatch / self.seconds


def _updates(gpus: int) -> float:
    """Per epoch."""
    return IMAGES / (gpus * IMAGES_PER_GPU)


ONE_SERVER = Point(8, "29 hours for 90 epochs", 29 * 3600 / (EPOCHS * _updates(8)))
"""What predictions start from: it agrees by construction."""
POINTS = (
    ONE_SERVER,
    Point(256, "1 hour for 90 epochs", 3600 / (EPOCHS * _updates(256))),
    Point(352, "an update 12 % longer than on 8 GPUs", 1.12 * ONE_SERVER.seconds),
    Point(352, "30 seconds per epoch", 30 / _updates(352)),
)
EFFICIENCY = 0.90
"""From 8 to 256 GPUs, "~90 %" (abstract)."""


@dataclass(frozen=True)
class Comparison:
    """A point beside its prediction."""

    point: Point
    prediction: Prediction

    @property
    def deviation(self) -> float:
        """Predicted seconds per update over published ones, less 1."""
        return self.prediction.seconds / self.point.seconds - 1


def paper_buckets(gradients: Sequence[Gradient]) -> list[Bucket]:
    """ResNet-50's gradients as the paper sends them: each layer's as soon as it is computed (§4).

    Args:
        gradients: of ResNet-50 (`pipeline.backward.trace`), brought to the 100 MB that the paper counts.
    """
    scale = GRADIENT_BYTES / sum(gradient.bytes for gradient in gradients)
    return [Bucket(bucket.bytes * scale, bucket.ready) for bucket in make_buckets(gradients, 0)]


def compare(gradients: Sequence[Gradient], cluster: Cluster = CLUSTER) -> list[Comparison]:
    """Every point beside its prediction from the time on one server.

    Args:
        gradients: of ResNet-50.
        cluster: the paper's, or what it would have been.
    """
    buckets = paper_buckets(gradients)
    step = alone(Step(ONE_SERVER.seconds, BACKWARD_SECONDS), buckets, cluster, ONE_SERVER.gpus)
    return [
        Comparison(point, predict(step, buckets, cluster, Batch(point.minibatch, IMAGES_PER_GPU, 1, point.gpus)))
        for point in POINTS
    ]


def efficiency(comparisons: Sequence[Comparison], gpus: int = 256) -> float:
    """Of so many GPUs against one server, as the paper reports it."""
    seconds = {comparison.point.gpus: comparison.prediction.seconds for comparison in comparisons}
    return seconds[ONE_SERVER.gpus] / seconds[gpus]


def worst(comparisons: Sequence[Comparison]) -> float:
    """The largest deviation, without its sign."""
    return max(abs(comparison.deviation) for comparison in comparisons)


def without_fit() -> Cluster:
    """The paper's cluster if the line rate were reached and no GPU were ever late."""
    return replace(CLUSTER, link=Link(LINE_RATE, CLUSTER.link.latency), straggler=0.0)


def best_straggler(gradients: Sequence[Gradient], bandwidth: float) -> Cluster:
    """The paper's cluster at another bandwidth, with the σ that then fits best, to half a millisecond."""
    candidates = (
        replace(CLUSTER, link=Link(bandwidth, CLUSTER.link.latency), straggler=half * 0.5e-3) for half in range(61)
    )
    return min(candidates, key=lambda cluster: worst(compare(gradients, cluster)))
