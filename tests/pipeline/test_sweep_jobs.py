"""Trainings side by side on one machine: how it is divided, and that none is started too many or left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline import config, sweep_jobs
from pipeline.sweep_jobs import Job, Jobs, last_lines
from pipeline.sweep_machine import Machine, Share
from shards.errors import UserError
from shards.files import exclusive
from tests.conftest import kill_everything, processes_with

ROOT = Path(__file__).parents[2]
CORE = min(os.sched_getaffinity(0))


# ---------------------------------------------------------------- the machine


def machine(gpus: int, cores: int, **given: int) -> Machine:
    return Machine(tuple(range(gpus)), tuple(range(cores)), given.get("ranks"), given.get("at_once"))


@pytest.mark.parametrize(
    ("gpus", "cores", "given", "workers", "ranks"),
    [
        (0, 16, {}, 8, 2),  # as `onehour train`: two ranks on the CPU
        (0, 2, {"at_once": 2}, 8, 1),
        (0, 16, {"ranks": 4}, 8, 4),
        (0, 16, {}, 1, 1),
        (8, 64, {}, 256, 8),
        (8, 64, {}, 4, 4),
        (8, 64, {"at_once": 4}, 256, 2),
        (8, 64, {"at_once": 3}, 256, 2),
        (8, 64, {"ranks": 1}, 256, 1),
    ],
)
def test_ranks_of_a_run_are_those_of_train_on_its_part(write_config, gpus, cores, given, workers, ranks):
    experiment = config.load(write_config("tiny", {"train_batch_size": 8 * workers}))
    assert machine(gpus, cores, **given).world_size(experiment) == ranks


def shares(*parts: tuple[str, str]) -> list[Share]:
    """Written as digits."""
    return [Share(tuple(map(int, gpus)), tuple(map(int, cores))) for gpus, cores in parts]


@pytest.mark.parametrize(
    ("gpus", "cores", "given", "world_sizes", "parts", "takes"),
    [
        (0, 2, {}, [2, 2], shares(("", "0"), ("", "1")), [2, 2]),  # one after the other
        (0, 4, {}, [2, 1, 1], shares(*(("", str(core)) for core in range(4))), [2, 1, 1]),
        (0, 8, {}, [2], shares(("", "0123"), ("", "4567")), [2]),  # a single run has all cores
        (0, 1, {}, [2, 2], shares(("", "0")), [1, 1]),
        (0, 2, {"at_once": 2}, [1, 1, 1], shares(("", "0"), ("", "1")), [1, 1, 1]),
        (0, 2, {"at_once": 4}, [1] * 4, shares(("", "0"), ("", "0"), ("", "1"), ("", "1")), [1] * 4),
        (2, 4, {}, [2, 1], shares(("0", "01"), ("1", "23")), [2, 1]),
        (4, 4, {}, [1, 1], shares(("0", "01"), ("1", "23")), [1, 1]),  # two GPUs idle, no core does
        (4, 4, {"at_once": 2}, [2, 1], shares(("01", "01"), ("23", "23")), [1, 1]),
        (0, 2, {}, [], shares(("", "01")), []),
    ],
)
def test_the_machine_is_divided_among_runs(gpus, cores, given, world_sizes, parts, takes):
    assert machine(gpus, cores, **given).divide(world_sizes) == (parts, takes)


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(UserError, match="a run of 4 ranks needs 4 GPUs, this machine has 2"):
        machine(2, 8, ranks=4).divide([4])
    with pytest.raises(UserError, match="3 runs at once of 2 ranks need 6 GPUs, this machine has 4"):
        machine(4, 8, ranks=2, at_once=3).divide([2, 2, 2])


def test_with_a_hostfile_runs_take_turns_and_no_core_is_reserved():
    there = Machine((0, 1), (0, 1), slots={"a": [0, 1], "b": [0, 1]}, options=("--hostfile", "hosts"))
    assert there.divide([4, 4]) == ([Share((), ())], [1, 1])
    assert there.arguments(4) == ("--hostfile", "hosts") and there.ranks_on_a_host(4) == 2
    assert machine(0, 2).arguments(2) == ("--ranks", "2")


# ---------------------------------------------------------------- the jobs


class Seen:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple] = []
        self.most = 0
        self.on_start = lambda job: None

    def started(self, job: Job) -> None:
        self.events.append(("started", job.name))
        self.on_start(job)

    def waiting(self, job: Job, why: str) -> None:
        self.events.append(("waiting", job.name, why))

    def ended(self, job: Job, code: int, seconds: float, *, stopping: bool) -> None:
        self.events.append(("ended", job.name, code, stopping))

    def stopping(self, *, again: bool) -> None:
        self.events.append(("stopping", again))

    def running(self, jobs: Sequence[Job]) -> None:
        self.most = max(self.most, len(jobs))

    def of(self, kind: str) -> list:
        return [event[1:] for event in self.events if event[0] == kind]


def job(folder: Path, name: str, script: str, parts: int = 1) -> Job:
    return Job(name, ("bash", "-c", script), folder / name, folder / "logs" / f"{name}.log", parts)


def run(jobs: list[Job], parts: int) -> Seen:
    seen = Seen()
    Jobs(jobs, [Share((number,), (CORE,)) for number in range(parts)], seen).run()
    return seen


@pytest.mark.parametrize(("parts", "takes", "most"), [(1, 1, 1), (2, 1, 2), (3, 2, 1), (4, 2, 2), (9, 1, 4)])
def test_as_many_at_once_as_there_are_parts_for(tmp_path, parts, takes, most):
    seen = run([job(tmp_path, name, "sleep 0.5", takes) for name in "abcd"], parts)
    assert seen.most == most
    assert seen.of("started") == [("a",), ("b",), ("c",), ("d",)]
    assert sorted(seen.of("ended")) == [(name, 0, False) for name in "abcd"]


def test_a_small_job_takes_what_a_large_one_cannot_use(tmp_path):
    seen = run([job(tmp_path, "a", "sleep 0.6", 2), job(tmp_path, "b", "true", 2), job(tmp_path, "c", "true")], 3)
    assert seen.of("started") == [("a",), ("c",), ("b",)]


def test_parts_are_whose_they_are(tmp_path):
    """GPUs at the same moment are different ones; cores are those of the share."""
    script = 'echo "$CUDA_VISIBLE_DEVICES"; taskset -pc $$ | sed "s/.*: //"; sleep 0.5'
    run([job(tmp_path, name, script, takes) for name, takes in (("a", 2), ("b", 1))], 3)
    said = {name: last_lines(tmp_path / "logs" / f"{name}.log") for name in "ab"}
    assert said == {"a": ["0,1", f"{CORE}"], "b": ["2", f"{CORE}"]}
    seen = Seen()
    Jobs([job(tmp_path, "c", 'echo "GPUs ${CUDA_VISIBLE_DEVICES-any}"; taskset -pc $$')], [Share((), ())], seen).run()
    devices, cores = last_lines(tmp_path / "logs" / "c.log")
    assert devices == f"GPUs {os.environ.get('CUDA_VISIBLE_DEVICES', 'any')}"
    own = subprocess.run(["taskset", "-pc", str(os.getpid())], capture_output=True, text=True, check=True).stdout
    assert cores.split(": ")[1] == own.strip().split(": ")[1]


def test_a_failure_ends_nothing_else_and_the_log_of_the_last_try_has_the_reason(tmp_path):
    for code in (3, 4):
        lines = "; ".join(f"echo line {number}" for number in range(20))
        seen = run([job(tmp_path, "a", f"{lines}; echo; echo code {code}; exit {code}"), job(tmp_path, "b", "true")], 1)
        assert seen.of("ended") == [("a", code, False), ("b", 0, False)]
        assert last_lines(tmp_path / "logs/a.log") == [*(f"line {number}" for number in range(13, 20)), f"code {code}"]
    assert (tmp_path / "logs/a.log").read_text().count("== ") == 2, "earlier ones are kept"
    assert last_lines(tmp_path / "logs/none.log") == []


def test_a_log_that_cannot_be_written_stops_what_runs(tmp_path):
    (tmp_path / "logs" / "b.log").mkdir(parents=True)
    with pytest.raises(UserError, match=r"logs/b\.log: b cannot be started: Is a directory"):
        run([job(tmp_path, "a", "sleep 60"), job(tmp_path, "b", "true")], 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_and_nothing_new_is_started(tmp_path, number):
    saves = "trap 'echo saved; exit 75' TERM; touch ready; for i in $(seq 600); do sleep 0.1; done"
    seen = Seen()
    jobs = Jobs(
        [job(tmp_path, name, saves.replace("ready", str(tmp_path / f"{name}-ready"))) for name in "abc"],
        [Share((), ()), Share((), ())],
        seen,
    )

    def when_ready() -> None:
        while not all((tmp_path / f"{name}-ready").exists() for name in "ab"):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=when_ready)
    thread.start()
    before = signal.getsignal(number)
    jobs.run()
    thread.join()
    assert seen.of("stopping") == [(False,)]
    assert jobs.stopping and signal.getsignal(number) == before
    assert seen.of("started") == [("a",), ("b",)]
    assert sorted(seen.of("ended")) == [("a", 75, True), ("b", 75, True)]
    assert last_lines(tmp_path / "logs" / "a.log") == ["saved"]


def test_a_second_signal_is_passed_on_too(tmp_path):
    deaf = f"trap 'n=1$n; [ $n = 11 ] && exit 9' TERM; touch {tmp_path}/ready; for i in $(seq 600); do sleep 0.1; done"
    seen = Seen()

    def twice() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.7)

    thread = threading.Thread(target=twice)
    thread.start()
    Jobs([job(tmp_path, "a", deaf)], [Share((), ())], seen).run()
    thread.join()
    assert seen.of("ended") == [("a", 9, True)]
    assert seen.of("stopping") == [(False,), (True,)]


def test_nobody_trains_on_when_the_sweep_is_killed(tmp_path):
    """SIGKILL leaves no time to tell them: the kernel does."""
    script = f"trap 'touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; while true; do sleep 0.1; done"
    code = f"""
from pathlib import Path
from pipeline.sweep_jobs import Job, Jobs
from pipeline.sweep_machine import Share
from tests.pipeline.test_sweep_jobs import Seen
folder = Path({str(tmp_path)!r})
Jobs([Job("a", ("bash", "-c", {script!r}), folder / "a", folder / "a.log")], [Share((), ())], Seen()).run()
"""
    marker = f"ONEHOUR_TEST={tmp_path}"
    environment = {**os.environ, "ONEHOUR_TEST": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        while processes_with(marker):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert (tmp_path / "saved").exists()
    finally:
        kill_everything(marker)


def test_a_folder_that_is_still_in_use_is_waited_for_while_others_go_on(tmp_path):
    seen = Seen()
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "b")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        threading.Timer(1.0, holder.kill).start()
        Jobs([job(tmp_path, "b", "true"), job(tmp_path, "c", "true")], [Share((), ())], seen).run()
    assert [name for name, *_ in seen.of("started")] == ["c", "b"]
    ((name, why),) = seen.of("waiting")
    assert name == "b" and "another training is writing here" in why
    assert [event[:2] for event in seen.of("ended")] == [("c", 0), ("b", 0)]


def test_it_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_jobs, "FOLDER_SECONDS", 0.5)
    (tmp_path / "a").mkdir()
    with exclusive(tmp_path / "a", "training"):
        seen = run([job(tmp_path, "a", "echo in use; exit 2")], 1)
    assert seen.of("ended") == [("a", 2, False)]


HOLDER = """
import sys, time
from pathlib import Path
from shards.files import exclusive
Path(sys.argv[1]).mkdir()
with exclusive(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""
