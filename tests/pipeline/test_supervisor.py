"""Launching again after a failure: on which hosts, how often, and when not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import reach, supervisor
from pipeline.fault import FAILED, FINISHED, MISTAKE, STOPPED, Fault
from pipeline.launch import Outcome
from pipeline.metrics import FILE_NAME, read_metrics
from pipeline.supervisor import Supervisor, choose
from shards.errors import UserError

# ---------------------------------------------------------------- on which hosts


def slots(*counts: int) -> dict[str, list[int]]:
    return {"abcdefgh"[number]: list(range(count)) for number, count in enumerate(counts)}


@pytest.mark.parametrize(
    ("counts", "answering", "workers", "least", "chosen"),
    [
        ((8, 8, 8, 8), "abcd", 256, 1, "abcd"),
        ((8, 8, 8, 8), "acd", 256, 1, "ac"),  # 24 ranks do not divide 256
        ((8, 8, 8, 8), "acd", 240, 1, "acd"),
        ((8, 8, 8, 8), "dcba", 256, 1, "abcd"),  # the hostfile's order, whoever answers first
        ((8, 8, 8, 8), "acd", 256, 3, ""),
        ((8, 8, 8, 8), "", 256, 1, ""),
        ((8, 8, 8, 8), "xyz", 256, 1, ""),
        ((4, 8, 4), "abc", 24, 2, "ab"),
        ((4, 8, 4), "abc", 32, 2, "abc"),
        ((4, 12, 4), "abc", 24, 2, "ac"),  # not next to each other
        ((1, 1, 8), "abc", 8, 1, "c"),  # ranks count, not hosts
        ((1, 1, 8), "abc", 8, 2, "ab"),
        ((3, 5), "ab", 15, 1, "b"),
        ((3, 5), "ab", 7, 1, ""),
        ((2, 2, 2), "abc", 12, 3, "abc"),
    ],
)
def test_the_most_hosts_whose_ranks_divide_the_workers(counts, answering, workers, least, chosen):
    assert choose(slots(*counts), list(answering), workers, least) == list(chosen)


def test_no_choice_of_more_ranks_is_missed():
    """Against all subsets, of hosts that differ."""
    for counts in ((1, 2, 3, 4), (8, 4, 4, 8), (5, 1, 1, 5), (2, 2, 3, 3), (6, 1, 2, 9), (2, 2, 2, 2)):
        offered = slots(*counts)
        subsets = [some for count in range(1, 5) for some in combinations(offered, count)]
        ranks = {some: sum(len(offered[host]) for host in some) for some in subsets}
        for workers in range(1, 49):
            for least in (1, 2, 4):
                fitting = [some for some in subsets if len(some) >= least and workers % ranks[some] == 0]
                chosen = choose(offered, list(offered), workers, least)
                best = max((ranks[some] for some in fitting), default=0)
                assert chosen == [] if not best else tuple(chosen) in fitting and ranks[tuple(chosen)] == best


def test_thousands_of_hosts_are_chosen_from_at_once():
    many = {f"node{number}": range(8) for number in range(4096)}
    assert len(choose(many, list(many)[:-1], 32768, 1)) == 2048


# ---------------------------------------------------------------- how often, and when not


class Scripted:
    """A launch whose outcomes are given, and the hosts that answer before each.

    Attributes:
        launched: the hosts of every launch.
        slept: seconds, between them.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, hostfile: Path) -> None:
        self.folder = folder
        blocks = SimpleNamespace(train_batch_size=96, train_micro_batch_size_per_gpu=8)
        self.experiment = SimpleNamespace(blocks=blocks, path="x.json")
        self.args = SimpleNamespace(hostfile=hostfile)
        self.given: dict[str, str] = {}
        self.remote, self.launcher = True, "pdsh"
        self.launched: list[str] = []
        self.slept: list[float] = []
        self.outcomes: list[Outcome | Callable[[threading.Event], Outcome]] = []
        self.silent: list[str] = []  # for each time that hosts are asked, those that do not answer; then the last
        self.now = 0.0
        monkeypatch.setattr(supervisor, "time", SimpleNamespace(sleep=self._sleep, monotonic=lambda: self.now))
        monkeypatch.setattr(reach, "answering", self._answering)

    def run(self, ranks: Any, interrupt: threading.Event) -> Outcome:
        self.launched.append("".join(ranks.hosts))
        outcome = self.outcomes.pop(0)
        return outcome if isinstance(outcome, Outcome) else outcome(interrupt)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def _answering(self, hosts: list[str], port: int | None) -> tuple[list[str], Mapping[str, str]]:
        silent = self.silent.pop(0) if len(self.silent) > 1 else (self.silent or [""])[0]
        return [host for host in hosts if host not in silent], {
            host: "No route to host" for host in hosts if host in silent
        }


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=2\nc slots=2\n")
    folder = tmp_path / "run"
    folder.mkdir()
    yield Scripted(folder, monkeypatch, hostfile)


def supervise(launch: Scripted, restarts: int = 5, least: int | None = 1) -> int:
    return Supervisor(launch, slots(2, 2, 2), restarts, least).run()  # type: ignore[arg-type]


def failed(step: int, code: int = FAILED) -> Outcome:
    return Outcome(code, False, step, Fault("silent", 1, "b", step, f"rank 1 on b is gone after update {step}"))


DONE = Outcome(FINISHED, True, 100)


def test_a_run_that_finishes_is_launched_once(scripted):
    scripted.outcomes = [DONE]
    assert supervise(scripted) == FINISHED
    assert scripted.launched == ["abc"] and scripted.slept == []


def test_a_finished_run_counts_though_the_launcher_failed(scripted):
    scripted.outcomes = [Outcome(FAILED, True, 100)]
    assert supervise(scripted) == FAILED
    assert scripted.launched == ["abc"]


def test_failures_that_get_further_are_followed_by_launches_at_growing_distances(scripted, capfd):
    scripted.outcomes = [*map(failed, (10, 20, 30, 40, 50)), DONE]
    assert supervise(scripted) == FINISHED
    assert scripted.launched == ["abc"] * 6
    assert scripted.slept == [5, 10, 20, 40, 60]
    said = capfd.readouterr().err
    assert "ended after update 20: rank 1 on b is gone after update 20" in said
    assert "launching 6 ranks × 2 accumulation on a, b, c" in said and "restart 5 of 5 in 60 s" in said


def test_a_failure_after_the_same_update_on_the_same_hosts_is_not_tried_a_third_time(scripted, capfd):
    scripted.outcomes = [failed(10), failed(10)]
    assert supervise(scripted, least=3) == FAILED
    assert len(scripted.launched) == 2
    assert "failed after update 10 on the same hosts twice" in capfd.readouterr().err


def test_a_host_that_answers_and_fails_is_left_out(scripted, capfd):
    scripted.outcomes = [failed(10), failed(10), DONE]
    assert supervise(scripted) == FINISHED
    assert scripted.launched == ["abc", "abc", "ac"]
    assert "going on without b" in capfd.readouterr().err


def test_ranks_that_somebody_else_told_to_stop_go_on(scripted):
    """A host that is shut down, or taken away by the cloud, sends SIGTERM to its ranks, and all save."""
    scripted.outcomes = [Outcome(STOPPED, False, 20), DONE]
    assert supervise(scripted) == FINISHED
    assert len(scripted.launched) == 2 and len(scripted.slept) == 1


def test_on_other_hosts_the_same_update_is_tried_again(scripted):
    scripted.outcomes = [failed(10), failed(10), DONE]
    scripted.silent = ["", "b", "b"]
    assert supervise(scripted) == FINISHED
    assert scripted.launched == ["abc", "ac", "ac"]


def test_restarts_come_to_an_end(scripted, capfd):
    scripted.outcomes = [failed(step) for step in range(10)]
    assert supervise(scripted, restarts=2) == FAILED
    assert len(scripted.launched) == 3
    assert "gave up after 2 restarts" in capfd.readouterr().err


@pytest.mark.parametrize("code", [MISTAKE, STOPPED, 128 + 15, 128 + 2])
def test_a_mistake_and_what_somebody_stopped_are_not_tried_again(scripted, code):
    scripted.outcomes = [Outcome(code, False, 7, wanted=code != MISTAKE)]
    assert supervise(scripted) == code
    assert len(scripted.launched) == 1


def test_a_mistake_before_the_launch_is_the_users(scripted):
    def mistaken(interrupt: threading.Event) -> Outcome:
        raise UserError("x.json: wrong")

    scripted.outcomes = [mistaken]
    with pytest.raises(UserError, match="wrong"):
        supervise(scripted)


def test_a_host_that_goes_away_while_it_is_asked_is_no_mistake(scripted):
    def unreachable(interrupt: threading.Event) -> Outcome:
        raise UserError("1 of 3 hosts cannot start a rank: b")

    scripted.outcomes = [unreachable, DONE]
    scripted.silent = ["", "b", "b"]
    assert supervise(scripted) == FINISHED
    assert scripted.launched == ["abc", "ac"]


def test_a_host_that_comes_back_is_taken_in_without_counting_as_a_failure(scripted, monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "ASKING_SECONDS", 0.01)

    def train_until_asked(interrupt: threading.Event) -> Outcome:
        assert interrupt.wait(10), "nobody asked"
        return Outcome(STOPPED, False, 33)

    scripted.outcomes = [train_until_asked, DONE]
    scripted.silent = ["b", "b", "b", ""]
    assert supervise(scripted, restarts=1) == FINISHED
    assert scripted.launched == ["ac", "abc"] and scripted.slept == []
    assert "b answers again: saving to go on there" in capfd.readouterr().err


def test_one_that_comes_back_but_whose_ranks_do_not_divide_interrupts_nothing(scripted, monkeypatch):
    """Of 8 workers: 4 ranks do, 6 do not."""
    monkeypatch.setattr(supervisor, "ASKING_SECONDS", 0.01)
    scripted.experiment.blocks.train_batch_size = 64

    def train(interrupt: threading.Event) -> Outcome:
        assert not interrupt.wait(0.2)
        return DONE

    scripted.outcomes = [train]
    scripted.silent = ["b", ""]
    assert supervise(scripted) == FINISHED
    assert scripted.launched == ["ac"]


def test_too_few_hosts_are_waited_for(scripted, capfd):
    scripted.outcomes = [DONE]
    scripted.silent = ["bc", "bc", "c"]
    assert supervise(scripted, least=2) == FINISHED
    assert scripted.launched == ["ab"] and scripted.slept == [supervisor.ASKING_SECONDS] * 2
    assert "1 hosts answer, --min-nodes is 2: waiting" in capfd.readouterr().err


def test_but_not_for_ever(scripted, capfd):
    scripted.silent = ["abc"]
    assert supervise(scripted, least=2) == FAILED
    assert scripted.launched == []
    assert supervisor.WAITING_SECONDS <= scripted.now <= supervisor.WAITING_SECONDS + supervisor.ASKING_SECONDS
    assert "fewer hosts than --min-nodes 2 answered" in capfd.readouterr().err


def test_what_became_of_each_launch_is_in_the_record(scripted):
    (scripted.folder / FILE_NAME).touch()
    scripted.outcomes = [failed(10), failed(20), DONE]
    scripted.silent = ["", "c", ""]
    supervise(scripted)
    keys = ("event", "hosts", "step", "code", "message")
    events = [{key: event[key] for key in keys} for event in read_metrics(scripted.folder / FILE_NAME)]
    said = "rank 1 on b is gone after update "
    assert events == [
        {"event": "launch", "hosts": ["a", "b", "c"], "step": 10, "code": 1, "message": f"{said}10"},
        {"event": "launch", "hosts": ["a", "b"], "step": 20, "code": 1, "message": f"{said}20"},
    ]


# ---------------------------------------------------------------- what it refuses


def test_options_that_contradict_each_other_are_refused(scripted):
    for least in (0, 4):
        with pytest.raises(UserError, match=f"--min-nodes {least}: the hostfile gives 1 to 3 hosts"):
            supervise(scripted, least=least)
    scripted.experiment.blocks.train_batch_size = 8 * 7
    with pytest.raises(UserError, match="no 1 or more of the hosts have ranks that divide the 7 logical workers"):
        supervise(scripted)
    scripted.experiment.blocks.train_batch_size = None
    with pytest.raises(UserError, match="needs train_batch_size and train_micro_batch_size_per_gpu"):
        supervise(scripted)
    scripted.launcher = "openmpi"
    with pytest.raises(UserError, match="for several hosts that are started over ssh"):
        supervise(scripted)
