"""The batch triangle: DeepSpeed's own results where both accept, refusals with arithmetic and choices that work."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline import batch, config
from pipeline.batch import Batch
from pipeline.schema import Step
from shards.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
LOADED = config.load(CONFIGS / "imagenet_8k.json")
KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def with_sizes(train: int | None = None, micro: int | None = None, accumulation: int | None = None) -> config.Config:
    sizes = dict(zip(KEYS, (train, micro, accumulation), strict=True))
    return dataclasses.replace(LOADED, blocks=LOADED.blocks.model_copy(update=sizes))


def refusal(sizes: config.Config, world_size: int) -> UserError:
    with pytest.raises(UserError) as caught:
        batch.resolve(sizes, world_size)
    return caught.value


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


@pytest.fixture(scope="module")
def deepspeeds_triangle():
    """DeepSpeed's own resolution: (train, micro, accumulation) or None where it refuses."""
    from deepspeed.runtime.config import DeepSpeedConfig

    def resolve(train, micro, accumulation, world_size):
        theirs = DeepSpeedConfig.__new__(DeepSpeedConfig)  # its constructor reads W from a running process group
        theirs.world_size = world_size
        theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu = train, micro
        theirs.gradient_accumulation_steps = accumulation
        try:
            theirs._configure_train_batch_size()
        except AssertionError:
            return None
        return theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps

    return resolve


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_every_combination_gives_deepspeeds_triangle_or_both_refuse(deepspeeds_triangle, world_size):
    trains = (None, 1, 2, 4, 6, 12, 16, 17, 18, 24, 32, 48, 96)
    micros = (None, 1, 2, 3, 4, 8, 16)
    accumulations = (None, 1, 2, 3, 4)
    accepted = refused = 0
    for triple in itertools.product(trains, micros, accumulations):
        theirs = deepspeeds_triangle(*triple, world_size)
        try:
            ours = batch.resolve(with_sizes(*triple), world_size)
        except UserError:
            assert theirs is None, triple
            refused += 1
        else:
            assert (ours.train, ours.micro, ours.accumulation) == theirs, triple
            assert ours.world_size == world_size
            assert ours.train == ours.micro * ours.logical_workers
            accepted += 1
    assert accepted > 30
    assert refused > 30


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ((16, None, None), (16, 8, 1)),
        ((None, 4, None), (8, 4, 1)),
        ((16, 4, None), (16, 4, 2)),
        ((16, None, 2), (16, 4, 2)),
        ((None, 4, 2), (16, 4, 2)),
    ],
)
def test_the_fact_sheets_triangles_on_two_ranks(given, resolved):
    assert batch.resolve(with_sizes(*given), 2) == Batch(*resolved, world_size=2)


@pytest.mark.parametrize("given", [(17, None, None), (18, 4, None), (4, 4, None), (None, None, 2)])
def test_the_fact_sheets_refusals_on_two_ranks(given):
    refusal(with_sizes(*given), 2)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_logical_workers_do_not_depend_on_the_ranks(world_size):
    sizes = batch.resolve(LOADED, world_size)
    assert (sizes.train, sizes.micro, sizes.logical_workers) == (8192, 32, 256)
    assert sizes.accumulation == 256 // world_size
    assert sizes.deepspeed() == {
        "train_batch_size": 8192,
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 256 // world_size,
    }


@pytest.mark.parametrize("world_size", [1, 3, 7, 32])
def test_micro_batch_and_accumulation_let_the_batch_grow_with_the_ranks(world_size):
    assert batch.resolve(with_sizes(None, 32, 2), world_size).train == 64 * world_size


def test_no_size_at_all_says_what_to_give():
    error = refusal(with_sizes(None, None, 2), 2)
    assert "neither train_batch_size nor train_micro_batch_size_per_gpu" in error.headline
    assert "Give train_batch_size and train_micro_batch_size_per_gpu" in str(error)


@pytest.mark.parametrize("world_size", [0, -1])
def test_no_rank_is_refused(world_size):
    assert f"world size {world_size}: at least one rank is needed" in str(refusal(LOADED, world_size))


def test_indivisible_ranks_show_arithmetic_choices_and_their_rates():
    error = refusal(LOADED, 48)
    assert error.headline.endswith("train_batch_size 8,192 cannot be split over 48 ranks")
    assert "256 logical workers (8,192 / micro-batch 32)" in error.details[0]
    assert "256 / 48 = 5.33" in error.details[0]
    assert "Use 32 or 64 ranks with this file, or train_batch_size 7,680 or 9,216 for 48" in error.details[1]
    assert "LR would become 3 or 3.6" in error.details[1]


INDIVISIBLE = [
    (train, micro, ranks)
    for train, micro in [(8192, 32), (96, 8), (256, 32), (7 * 16, 16), (4, 4)]
    for ranks in (3, 5, 6, 9, 10, 48, 100, 300)
    if train // micro % ranks
]


@pytest.mark.parametrize(("train", "micro", "world_size"), INDIVISIBLE)
def test_suggested_ranks_and_batches_are_accepted_and_nearest(train, micro, world_size):
    workers = train // micro
    error = refusal(with_sizes(train, micro), world_size)
    form = r"Use ([\d, or]+) ranks with this file, or train_batch_size ([\d, or]+) for (\d+)"
    advice = re.match(form, error.details[-1])
    assert advice is not None, error.details
    ranks, batches = numbers(advice[1]), numbers(advice[2])
    assert int(advice[3]) == world_size
    for choice in ranks:
        assert batch.resolve(with_sizes(train, micro), choice).train == train
    nearer = range(min(ranks) + 1, max(ranks)) if len(ranks) == 2 else range(min(ranks) + 1, world_size + 1)
    assert not [r for r in nearer if workers % r == 0], "there is a nearer number of ranks"
    for choice in batches:
        assert batch.resolve(with_sizes(choice, micro), world_size).micro == micro
        assert abs(choice - train) < micro * world_size + 1
    assert any(choice > train for choice in batches)


@pytest.mark.parametrize(
    ("train", "micro", "accumulation", "world_size"),
    [
        (100, 32, None, 1),
        (100, 32, None, 2),
        (100, 32, None, 8),
        (10, 32, None, 4),
        (8190, 32, None, 256),
        (100, 32, 2, 2),
    ],
)
def test_batch_that_is_no_multiple_of_the_micro_batch_suggests_ones_that_work(train, micro, accumulation, world_size):
    error = refusal(with_sizes(train, micro, accumulation), world_size)
    assert f"train_batch_size {train:,} is not a multiple of train_micro_batch_size_per_gpu {micro}" in error.headline
    assert f"{train:,} / {micro} = {train / micro:.2f} logical workers." in error.details[0]
    advice = re.search(r"Use train_batch_size ([\d, or]+)", error.details[-1])
    assert advice is not None, error.details
    for choice in numbers(advice[1]):
        assert batch.resolve(with_sizes(choice, micro, accumulation), world_size).train == choice


@pytest.mark.parametrize(
    ("train", "accumulation", "world_size"), [(17, None, 2), (10, None, 4), (3, None, 4), (100, 3, 2), (5, 2, 4)]
)
def test_batch_without_micro_batch_suggests_ones_that_work(train, accumulation, world_size):
    error = refusal(with_sizes(train, None, accumulation), world_size)
    share = world_size * (accumulation or 1)
    assert f"{train} / {share} = {train / share:.2f} images per micro-batch." in error.details[0]
    advice = re.search(r"Use train_batch_size ([\d, or]+),", error.details[-1])
    assert advice is not None, error.details
    for choice in numbers(advice[1]):
        assert batch.resolve(with_sizes(choice, None, accumulation), world_size).train == choice


def test_three_sizes_that_contradict_each_other_show_the_arithmetic_and_the_mend_works():
    error = refusal(with_sizes(8192, 32, 8), 64)
    assert "contradict each other on 64 ranks" in error.headline
    assert "8,192 / (micro-batch 32 × 64 ranks) = 4, but gradient_accumulation_steps is 8" in error.details[0]
    assert "Leave gradient_accumulation_steps out" in error.details[1]
    assert batch.resolve(with_sizes(8192, 32), 64).accumulation == 4


def test_ranks_that_do_not_divide_three_sizes_get_advice_that_works():
    error = refusal(with_sizes(256, 32, 2), 3)
    for choice in numbers(re.search(r"train_batch_size ([\d, or]+) for 3", str(error))[1]):
        assert batch.resolve(with_sizes(choice, 32), 3).train == choice
    assert "gradient_accumulation_steps" in str(error), "no advice about ranks or batch alone can help"


@pytest.mark.parametrize(("available", "chosen"), [(1, 1), (2, 2), (3, 2), (7, 4), (8, 8), (300, 256)])
def test_largest_world_size_divides_the_logical_workers(available, chosen):
    assert batch.largest_world_size(LOADED, available) == chosen


def test_largest_world_size_takes_all_ranks_where_the_batch_grows_with_them():
    assert batch.largest_world_size(with_sizes(None, 32, 2), 7) == 7


def test_refusals_name_the_file():
    assert refusal(LOADED, 48).headline.startswith(f"{CONFIGS / 'imagenet_8k.json'}: ")


def with_step(loaded: config.Config, **step: object) -> config.Config:
    recipe = loaded.recipe.model_copy(update={"step": Step(**step)})
    return dataclasses.replace(loaded, recipe=recipe)


@pytest.mark.parametrize(
    ("step", "world_size", "together"),
    [
        ({}, 1, 1),
        ({"compile": True}, 1, 8),
        ({"compile": True}, 64, 4),
        ({"compile": True}, 256, 1),
        ({"compile": True, "ghost_batches": 1}, 1, 1),
        ({"ghost_batches": 16}, 8, 16),
        ({"ghost_batches": 100}, 8, 32),
        ({"ghost_batches": 7}, 8, 4),
        ({"ghost_batches": 256}, 1, 256),
    ],
)
def test_workers_at_once_divide_those_of_a_rank_and_change_nothing_else(step, world_size, together):
    """kn = 8192, n = 32: 256 logical workers; eight of them are the 256 images that fill a GPU."""
    sizes, plain = batch.resolve(with_step(LOADED, **step), world_size), batch.resolve(LOADED, world_size)
    assert sizes == dataclasses.replace(plain, together=together)
    assert sizes.deepspeed() == plain.deepspeed()
    engine = sizes.for_engine()
    assert engine["train_micro_batch_size_per_gpu"] == sizes.physical == 32 * together
    assert engine["gradient_accumulation_steps"] == sizes.passes == sizes.accumulation // together
    assert sizes.physical * sizes.passes * world_size == engine["train_batch_size"] == 8192


def test_a_micro_batch_larger_than_what_fills_a_gpu_goes_through_by_itself():
    large = with_step(with_sizes(4096, 512), compile=True)
    assert batch.resolve(large, 1).together == 1


@pytest.mark.parametrize("value", [0, -1, "all", 1.5])
def test_how_many_workers_at_once_is_a_number_or_auto(value):
    with pytest.raises(ValidationError, match="ghost_batches"):
        Step(ghost_batches=value)
