"""The four remarks of Goyal et al. 2017 (§3 and §2.3), one test each, against what the remark warns of.

Each test computes by hand, in float64, what is right and what the subtle mistake would give, and holds the engine to
the one and away from the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.engine import Engine, World
from pipeline.order import Order, micro_batch_positions
from pipeline.plan import Plan
from tests.conftest import fork_ranks
from tests.updates import N_MICRO, K, make_plan, micro_batch, network, physical_batches

UPDATES = 8
DECAY, MOMENTUM = 0.02, 0.9
CHANGES = {"optimizer.params.lr": 0.3, "optimizer.params.weight_decay": DECAY, "optimizer.params.nesterov": False}
Weights = dict[str, torch.Tensor]


def trained(world: World, path: Path, changes: dict[str, Any]) -> Weights:
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    resolved = make_plan(folder / "c.json", world.size, **changes)
    engine = Engine(network(batch_norm=False), resolved, world)
    for update in range(UPDATES):
        batches = physical_batches(update, world.rank, resolved.batch)
        engine.update(iter(batches), update * resolved.batch.train)
    return {name: parameter.detach().double() for name, parameter in engine.model.named_parameters()}


def by_hand(resolved: Plan, update_of: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Weights:
    """The weights after the same updates.

    Args:
        resolved: rates and normalisation of the images.
        update_of: (Σ ∇ℓ over the kn images, w, v, η of this update, η of the one before) → (change of w, new v).
    """
    model = network(batch_norm=False).double()
    transform = resolved.config.recipe.transform
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1).double() * 255 for numbers in (transform.mean, transform.std))
    weights = list(model.parameters())
    velocities = [torch.zeros_like(weight) for weight in weights]
    before = resolved.schedule.lr(0)
    for update in range(UPDATES):
        batches = [micro_batch(update, worker) for worker in range(K)]
        images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])
        loss = F.cross_entropy(model((images.double() - mean) / std), labels, reduction="sum")
        gradients = torch.autograd.grad(loss, weights)
        lr = resolved.schedule.lr(update * resolved.batch.train)
        with torch.no_grad():
            for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                change, velocities[index] = update_of(gradient, weight, velocities[index], lr, before)
                weight += change
        before = lr
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def apart(one: Weights, other: Weights) -> float:
    """The largest difference of two weights, in units of the largest change that training made."""
    start = dict(network(batch_norm=False).double().named_parameters())
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    return max((one[name] - other[name]).abs().max().item() for name in one) / moved


KN = K * N_MICRO


def equation_9(gradient, weight, velocity, lr, before):
    velocity = MOMENTUM * velocity + gradient / KN + DECAY * weight
    return -lr * velocity, velocity


def hold_to(tmp_path: Path, right: Callable, wrong: Callable, changes: dict[str, Any] | None = None) -> None:
    changes = {**CHANGES, **(changes or {})}
    tmp_path.mkdir(exist_ok=True)
    resolved = make_plan(tmp_path / "reference.json", 1, **changes)
    expected, mistaken = by_hand(resolved, right), by_hand(resolved, wrong)
    assert apart(expected, mistaken) > 0.02, "the mistake would show"
    for world_size in (1, 2):
        for weights in fork_ranks(trained, world_size, tmp_path / str(world_size), changes):
            assert apart(expected, weights) < 1e-4


def test_remark_1_scaling_the_loss_is_not_scaling_the_rate(tmp_path):
    """§3: "Scaling the cross-entropy loss is not equivalent to scaling the learning rate", for the weights decay.

    kn is twice the reference batch. The mistake: the rate of the reference batch, and twice the loss.
    """
    resolved = make_plan(tmp_path / "c.json", 1, **CHANGES)
    factor = float(resolved.schedule.peak_lr / resolved.schedule.reference_lr)
    assert factor == 2

    def scaled_loss(gradient, weight, velocity, lr, before):
        velocity = MOMENTUM * velocity + factor * gradient / KN + DECAY * weight
        return -lr / factor * velocity, velocity

    hold_to(tmp_path, equation_9, scaled_loss, {"scheduler.params.warmup": "none"})


def test_remark_2_the_velocity_needs_no_correction_where_the_rate_is_outside_of_it(tmp_path):
    """§3: "Apply momentum correction after changing learning rate if using (10)". torch's SGD is (9).

    The rate changes at every update here. The mistakes: (10) without its correction, and (9) with one.
    """

    def equation_10_uncorrected(gradient, weight, velocity, lr, before):
        velocity = MOMENTUM * velocity + lr * (gradient / KN + DECAY * weight)
        return -velocity, velocity

    def equation_10_corrected(gradient, weight, velocity, lr, before):
        velocity = MOMENTUM * lr / before * velocity + lr * (gradient / KN + DECAY * weight)
        return -velocity, velocity

    def equation_9_corrected(gradient, weight, velocity, lr, before):
        velocity = MOMENTUM * lr / before * velocity + gradient / KN + DECAY * weight
        return -lr * velocity, velocity

    changes = {"scheduler.params.warmup_epochs": 1.5, "scheduler.params.milestones": [1.6]}
    resolved = make_plan(tmp_path / "c.json", 1, **CHANGES, **changes)
    rates = [resolved.schedule.lr(update * KN) for update in range(UPDATES)]
    assert len(set(rates)) > UPDATES - 2 and min(rates[1:]) < max(rates) / 5, rates
    assert apart(by_hand(resolved, equation_9), by_hand(resolved, equation_10_corrected)) < 1e-12, "they are the same"
    hold_to(tmp_path / "10", equation_9, equation_10_uncorrected, changes)
    hold_to(tmp_path / "9", equation_9, equation_9_corrected, changes)


def test_remark_3_the_loss_is_an_average_over_all_images_of_the_update(tmp_path):
    """§3: "Normalize the per-worker loss by total minibatch size kn, rather than per-worker size n".

    The mistake: gradients of means over n are summed up, and the rate is not scaled to make up for it.
    """

    def summed_over_workers(gradient, weight, velocity, lr, before):
        velocity = MOMENTUM * velocity + gradient / N_MICRO + DECAY * weight
        return -lr / K * velocity, velocity

    hold_to(tmp_path, equation_9, summed_over_workers)


def test_remark_4_one_permutation_of_all_images_per_epoch_is_divided_among_the_workers():
    """§3: "Use a single random shuffling of the training data (per epoch) that is divided amongst all k workers".

    The mistake: every worker shuffles a part of its own, and sees the same images in every epoch.
    """
    samples, micro = 960, 8
    order = Order(samples, seed=3)
    updates = samples // (K * micro)
    for world_size in (1, 2, 4):
        accumulation = K // world_size
        seen: list[list[np.ndarray]] = []
        for epoch in range(3):
            workers: list[list[int]] = [[] for _ in range(K)]
            for update in range(epoch * updates, (epoch + 1) * updates):
                for rank in range(world_size):
                    for step in range(accumulation):
                        sizes = {"micro": micro, "accumulation": accumulation, "world_size": world_size}
                        start, stop = micro_batch_positions(update, step, rank, **sizes)
                        workers[rank * accumulation + step] += order.ids(start, stop).tolist()
            assert sorted(sample for ids in workers for sample in ids) == list(range(samples)), "every image once"
            seen.append([np.array(ids) for ids in workers])
        for worker in range(K):
            first, second = set(seen[0][worker].tolist()), set(seen[1][worker].tolist())
            common = len(first & second)
            # of 240 images a quarter, 60, come again by chance, give or take 6
            assert 30 < common < 90, "each worker's images are others in the next epoch"
        assert not np.array_equal(np.concatenate(seen[0]), np.concatenate(seen[1]))
