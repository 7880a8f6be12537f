"""Updates that overflow: counted exactly however seldom somebody looks, nothing changed by them, stopped in time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.divergence import not_finite, overflowed
from pipeline.engine import Engine, World
from pipeline.metrics import Event, read_metrics
from pipeline.overflow import OverflowCounter, Overflows
from pipeline.saves import checkpoints_folder
from tests.conftest import fork_ranks
from tests.pipeline.test_engine import make_plan, micro_batch, network
from tests.training import ENVIRONMENT, onehour, output_of, run_of
from tests.updates import physical_batches

READS_A_VALUE = ("_local_scalar_dense", "nonzero", "equal")
"""Operations of torch that wait for the device, because their answer is a value on the host."""


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU; a CPU has nothing to wait for, but runs the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in READS_A_VALUE
        return func(*args, **(kwargs or {}))


class Updates:
    """One weight under a loss scaler, whose gradient overflows when it is told to."""

    def __init__(self, *, fused: bool) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        self.scaler.scale(torch.zeros(()))  # makes the scaler's tensors
        self.counter = OverflowCounter(self.optimizer)

    def run(self, overflows: bool) -> None:
        self.weight.grad = torch.full((3,), float("inf") if overflows else 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update(1.0)
        self.counter.attempted()


def streaks(flags: list[bool]) -> list[int]:
    return [len(list(run)) for withheld, run in groupby(flags) if withheld]


def expected(flags: list[bool], begin: int, end: int) -> Overflows:
    """What a reading after `end` updates answers, where the one before it was after `begin`."""
    streak = streaks(flags[:end])[-1] if end and flags[end - 1] else 0
    # a streak that had begun before counts whole, if it went on
    grown = [streaks(flags[:stop])[-1] for stop in range(begin + 1, end + 1) if flags[stop - 1]]
    return Overflows(sum(flags[:end]), streak, max(grown, default=0))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@settings(deadline=None)
@given(flags=st.lists(st.booleans(), max_size=30), readings=st.sets(st.integers(0, 30)))
def test_streaks_are_counted_exactly_whenever_they_are_read(fused: bool, flags: list[bool], readings: set[int]):
    updates, before = Updates(fused=fused), 0
    for number in range(len(flags) + 1):
        if number in readings or number == len(flags):
            assert updates.counter.withheld == sum(flags[:number])
            assert updates.counter.take() == expected(flags, before, number)
            before = number
        if number < len(flags):
            updates.run(flags[number])
    assert torch.equal(updates.weight.detach(), torch.full((3,), -float(len(flags) - sum(flags))))


def test_a_streak_longer_than_the_interval_between_readings_is_seen_whole():
    updates = Updates(fused=True)
    seen = []
    for number in range(1, 13):
        updates.run(2 <= number <= 9)
        if number % 3 == 0:
            seen.append(updates.counter.take())
    assert seen == [Overflows(2, 2, 2), Overflows(5, 5, 5), Overflows(8, 8, 8), Overflows(8, 0, 0)]


@pytest.mark.parametrize(("fused", "reads"), [(True, 0), (False, 1)], ids=["fused", "plain"])
def test_counting_a_fused_optimizers_updates_waits_for_nothing(fused: bool, reads: int):
    """An unfused one has its scaler wait, once per update, which also shows that the test can see it."""
    updates = Updates(fused=fused)
    with Waits() as waits:
        for overflows in (True, False, True, True):
            updates.run(overflows)
    assert waits.count == 4 * reads
    assert updates.counter.take() == Overflows(3, 2, 2)


# ---------------------------------------------------------------- real updates


def make_engine(world: World, path: Path, changes: dict[str, Any]) -> Engine:
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    return Engine(network(batch_norm=True), make_plan(folder / "c.json", world.size, **changes), world)


def run_update(engine: Engine, number: int) -> None:
    accumulation = engine.plan.batch.accumulation
    workers = range(engine.world.rank * accumulation, (engine.world.rank + 1) * accumulation)
    engine.update(iter([micro_batch(number, worker) for worker in workers]), number * engine.plan.batch.train)


def optimizer_tensors(engine: Engine) -> dict[tuple[int, str], torch.Tensor]:
    """Copies of momentum and all else that the optimizer keeps, by parameter and name."""
    states = enumerate(engine.optimizer.state.values())
    return {(number, name): tensor.clone() for number, state in states for name, tensor in state.items()}


def storm(world: World, path: Path, changes: dict[str, Any], updates: int, again: int | None) -> dict[str, Any]:
    """Some updates from a scale that overflows, which update `again` is given again; what each of them did.

    Memory that nobody has written to holds NaN.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    engine = make_engine(world, path, {"fp16.enabled": True, "fp16.initial_scale_power": 32, **changes})
    withheld, scales, lrs, momenta = [], [], [], []
    for number in range(updates):
        if number == again:
            engine._engine.torch_autocast_z0_gradscaler._scale.fill_(2.0**32)
        weights = [parameter.clone() for parameter in engine.model.parameters()]
        before = optimizer_tensors(engine)
        run_update(engine, number)
        unchanged = [torch.equal(a, b) for a, b in zip(weights, engine.model.parameters(), strict=True)]
        assert len(set(unchanged)) == 1, "all weights move, or none"
        withheld.append(unchanged[0])
        now = optimizer_tensors(engine)
        if withheld[-1]:
            for key, tensor in now.items():  # a fused Adam makes its own at the first attempt
                assert torch.equal(tensor, before.get(key, torch.zeros_like(tensor))), key
        momenta.append(max((float(tensor.abs().max()) for tensor in now.values()), default=0.0))
        scales.append(engine.loss_scale)
        lrs.append(engine.lr_used)
    return {
        "withheld": withheld,
        "scales": scales,
        "lrs": lrs,
        "momenta": momenta,
        "counted": engine.take_overflows(),
        "state": engine.model.state_dict(),
    }


OPTIMIZERS = {
    "sgd": {},
    "fused-sgd": {"optimizer.params.fused": True},
    "adam": {"optimizer": {"type": "AdamW", "params": {"lr": 0.002, "weight_decay": 0.01}}},
    "fused-adam": {"optimizer": {"type": "AdamW", "params": {"lr": 0.002, "weight_decay": 0.01, "fused": True}}},
}


@pytest.mark.parametrize("again", [None, 20], ids=["at-first", "and-in-mid-run"])
@pytest.mark.parametrize(
    ("optimizer", "world_size"),
    [("sgd", 1), ("sgd", 2), ("fused-sgd", 1), ("fused-sgd", 2), ("adam", 1), ("fused-adam", 1)],
)
def test_a_storm_is_counted_and_changes_nothing(tmp_path, optimizer, world_size, again):
    updates = 40 if again else 20
    answers = fork_ranks(storm, world_size, tmp_path, OPTIMIZERS[optimizer], updates, again)
    first = answers[0]
    withheld = first["withheld"]
    lengths = streaks(withheld)
    assert withheld[0] and withheld[again or 0] and not withheld[-1]
    storms = 2 if again else 1
    assert min(lengths[:storms]) > 5 and sum(lengths[storms:]) < 3, "storms, and hardly anything besides"
    scale = 2.0**32
    for number, (skipped, now) in enumerate(zip(withheld, first["scales"], strict=True)):
        scale = 2.0**32 if number == again else scale
        scale *= 0.5 if skipped else 1
        assert now == scale
    # the first update that is applied is the first that leaves a momentum
    assert [momentum > 0 for momentum in first["momenta"]] == [number >= lengths[0] for number in range(updates)]
    schedule = make_plan(tmp_path / "c.json", 1, **OPTIMIZERS[optimizer]).schedule
    assert first["lrs"] == [schedule.lr(update * 32) for update in range(updates)]
    assert len(set(first["lrs"][: lengths[0]])) > 1, "a rate that waits for updates would show"
    for answer in answers:
        assert answer["counted"] == Overflows(sum(lengths), 0, max(lengths))
        assert answer["withheld"] == withheld and answer["scales"] == first["scales"]
        for name, tensor in answer["state"].items():
            assert tensor.isfinite().all(), name
            if "running" not in name:
                assert torch.equal(tensor, first["state"][name]), f"{name} differs between the ranks"


def test_a_storm_leaves_a_fused_optimizer_where_it_leaves_an_unfused_one(tmp_path):
    for kind in ("sgd", "adam"):
        [plain], [fused] = (
            fork_ranks(storm, 1, tmp_path / name, OPTIMIZERS[name], 20, None) for name in (kind, f"fused-{kind}")
        )
        for name, tensor in plain["state"].items():
            torch.testing.assert_close(fused["state"][name], tensor, rtol=1e-5, atol=1e-6)


def overflowing_forward(world: World, path: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Running statistics before and after an update whose first layer overflows in one channel, and after the next."""
    changes = {"fp16.enabled": True, "fp16.initial_scale_power": 4, **changes}
    engine = make_engine(world, path, changes)
    layers = [module for module in engine.model.modules() if isinstance(module, _BatchNorm)]
    first = next(iter(engine.model.parameters()))

    def statistics() -> list[list[torch.Tensor]]:
        return [[layer.running_mean.clone(), layer.running_var.clone()] for layer in layers]

    states = []
    for number in range(3):
        good = first[2].clone()
        with torch.no_grad():
            first[2] *= 1e6 if number == 1 else 1
        engine.update(iter(physical_batches(number, world.rank, engine.plan.batch)), number * engine.plan.batch.train)
        with torch.no_grad():
            first[2] = good if number == 1 else first[2]
        states.append(statistics())
    counted = engine.take_overflows()
    engine.average_statistics()
    return {"states": states, "counted": counted, "averaged": statistics()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer.params.fused": True}, {"recipe.step.ghost_batches": 2}],
    ids=["plain", "fused", "ghosts"],
)
def test_an_overflow_of_the_forward_pass_leaves_no_trace_in_the_statistics(tmp_path, world_size, changes):
    """Of one channel in the first BN layer, and of all that come after it in the second."""
    for answer in fork_ranks(overflowing_forward, world_size, tmp_path, changes):
        before, storm, after = answer["states"]
        assert answer["counted"] == Overflows(1, 0, 1)
        for kind in (0, 1):
            others = [channel for channel in range(6) if channel != 2]
            assert torch.equal(storm[0][kind][2], before[0][kind][2])
            assert not torch.isclose(storm[0][kind][others], before[0][kind][others]).any()
            assert torch.equal(storm[1][kind], before[1][kind])
            assert all(layer[kind].isfinite().all() for layer in [*after, *answer["averaged"]])
            assert not torch.equal(after[1][kind], storm[1][kind])


def waits(world: World, path: Path, changes: dict[str, Any]) -> list[int]:
    """How often each of some updates waits for the device, the overflowing first ones among them."""
    engine = make_engine(world, path, {"fp16.enabled": True, "fp16.initial_scale_power": 20, **changes})
    counts = []
    for number in range(6):
        with Waits() as waits:
            run_update(engine, number)
        counts.append(waits.count)
    assert 0 < engine.take_overflows().withheld < 6
    return counts


def test_an_update_that_may_overflow_waits_for_nothing_where_the_optimizer_is_fused(tmp_path):
    [fused] = fork_ranks(waits, 1, tmp_path / "fused", {"optimizer.params.fused": True})
    [plain] = fork_ranks(waits, 1, tmp_path / "plain", {})
    assert fused == [0] * 6
    assert plain == [1] * 6


# ---------------------------------------------------------------- what is said


def test_a_checkpoint_is_spoken_of_only_where_there_is_one(tmp_path: Path):
    resolved = make_plan(tmp_path / "c.json", 1, **{"fp16.enabled": True})
    folder = checkpoints_folder(resolved.config.run_folder)

    def said() -> list[str]:
        numbers = {"step": 60, "samples": 1920, "none_applied": False, "loss_scale": 1.0}
        return [str(overflowed(resolved, 50, **numbers)), str(not_finite(resolved, "the loss is nan", 1920))]

    for message in said():
        assert f"No checkpoint had been saved by then: there is none in {folder}" in message
        assert "last checkpoint" not in message
    for step in (4, 41, 7):
        (folder / f"step-{step}").mkdir(parents=True)
    (folder / ".step-50.writing").mkdir()
    for message in said():
        assert f"The last checkpoint was saved before: {folder / 'step-41'}" in message
        assert "No checkpoint" not in message


# ---------------------------------------------------------------- whole runs

SHORT_UPDATES = {"train_batch_size": 16, "recipe.epochs": 1, "recipe.logging.every_steps": 3}
STORM = {**SHORT_UPDATES, "fp16.enabled": True, "fp16.initial_scale_power": 32}
WATCHED = "recipe.watchdog"


def train(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipeline.train", str(path)]
    return subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=200, check=False)


def events_of(path: Path, kind: str) -> list[Event]:
    return [event for event in read_metrics(run_of(path) / "metrics.jsonl") if event["event"] == kind]


def assert_stopped_at_once(path: Path, said: str) -> None:
    """Five are allowed, and a report comes after every third: the first that sees five is that of update 6."""
    assert "6 updates in a row overflowed in float16 by update 6 (epoch 0.74): none was ever applied" in said
    assert "began at 2^32 and is 6.71089e+07 now" in said and "fp16.initial_scale_power" in said
    assert '"bf16": {"enabled": true}' in said and "recipe.watchdog.withheld_updates is 5" in said
    assert "optimizer.params.lr" not in said and "Traceback" not in said
    assert [(event["step"], event["skipped_steps"]) for event in events_of(path, "train")] == [(3, 3), (6, 6)]
    assert [(event["step"], event["skipped"]) for event in events_of(path, "skip")] == [(3, 3), (6, 3)]
    assert not events_of(path, "finished") and not (run_of(path) / "checkpoints").exists()
    assert not events_of(path, "diverged"), "nothing was trained: that is not what the recipe comes to"


def test_a_storm_from_the_first_update_on_stops_a_run_and_says_what_to_try(write_config: Callable[..., Path]):
    path = write_config("storm", {**STORM, WATCHED: {"withheld_updates": 5}})
    done = train(path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert_stopped_at_once(path, done.stderr)
    assert "3 updates withheld by an overflow near update 3; the loss scale is 5.36871e+08 now" in done.stdout
    assert "3 withheld" in done.stdout and "6 withheld" in done.stdout


@pytest.mark.slow
@pytest.mark.launcher
def test_two_ranks_of_a_storm_stop_after_the_same_update(write_config: Callable[..., Path]):
    path = write_config("storm", {**STORM, WATCHED: {"withheld_updates": 5}})
    output = output_of(onehour("train", path, "--ranks", "2"), code=2)
    assert_stopped_at_once(path, output)
    assert output.count("updates in a row overflowed") == 1


@pytest.mark.slow
def test_a_run_stops_at_so_many_withheld_updates_and_not_at_one_less(write_config: Callable[..., Path]):
    changes = {**STORM, "recipe.epochs": 4}
    never = write_config("never", {**changes, WATCHED: {"withheld_updates": 0}})
    assert train(never).returncode == 0
    rows = events_of(never, "train")
    length = rows[-1]["skipped_steps"]  # of one storm, which the run begins with
    assert 5 < length < 20 and rows[-1]["loss"] < rows[0]["loss"]

    reached = write_config("reached", {**changes, WATCHED: {"withheld_updates": length}})
    done = train(reached)
    assert done.returncode == 2 and f"{length} updates in a row overflowed" in done.stderr, done.stdout + done.stderr
    assert events_of(reached, "train")[-1]["step"] == next(row["step"] for row in rows if row["step"] >= length)

    missed = write_config("missed", {**changes, WATCHED: {"withheld_updates": length + 1}})
    assert train(missed).returncode == 0
    assert events_of(missed, "train")[-1]["skipped_steps"] == length and events_of(missed, "finished")


@pytest.mark.slow
def test_a_storm_in_mid_run_is_said_to_be_a_divergence(write_config: Callable[..., Path]):
    """The rate of the first update blows the weights up, so that it alone is applied."""
    changes = {**SHORT_UPDATES, "optimizer.params.lr": 1e12, WATCHED: {"withheld_updates": 5}}
    path = write_config("diverging", {**changes, "torch_autocast": {"enabled": True, "dtype": "float16"}})
    done = train(path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "5 updates in a row overflowed in float16 by update 6 (epoch 0.74)\n" in done.stderr
    [end] = events_of(path, "diverged")
    assert (end["step"], end["why"]) == (6, "5 updates in a row overflowed in float16 by update 6 (epoch 0.74)")
    for mend in (
        "Lower optimizer.params.lr",
        '"initial_scale_power": 8',
        'torch_autocast.dtype "bfloat16"',
        "No checkpoint had been saved by then",
    ):
        assert mend in done.stderr
