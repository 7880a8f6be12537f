"""What happens to a rank, a host, a cable or a launcher ends the training on every host, and says what it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.fault import STOPPED
from pipeline.metrics import read_metrics
from pipeline.samples import read_samples
from tests.cluster.hosts import Cluster
from tests.cluster.launched import Launched, configure, tidy, wait_until_nothing_is_left

pytestmark = [pytest.mark.root, pytest.mark.launcher, pytest.mark.timeout(900)]

SILENT, STUCK = 8, 15
ENDLESS = {
    "recipe.epochs": 100_000,
    "scheduler.params.milestones": [],
    "recipe.checkpoint.every_epochs": 50_000,
    "recipe.evaluation.every_epochs": 100_000,
    "recipe.watchdog.silent_seconds": SILENT,
    "recipe.watchdog.stuck_seconds": STUCK,
}
SLACK = 20
"""Seconds beyond the watch's own, for a loaded machine."""


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """Two hosts whose network devices have different names."""
    return make_cluster(2, nics=("eth0", "ens5"))


@pytest.fixture
def training(cluster: Cluster, tiny_shards: Path, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts an endless training on both hosts, and waits until it trains."""

    def start(**changes: object) -> Launched:
        path = configure(tiny_shards, tmp_path, "endless", {**ENDLESS, **changes})
        launched = Launched(cluster.hosts[0], path, "--hostfile", cluster.hostfile(tmp_path / "hostfile"))
        launched.wait_for_step(3)
        return launched

    with tidy(cluster):
        yield start


def fault_of(launched: Launched) -> dict:
    """The one `fault` event of the record."""
    [fault] = [event for event in read_metrics(launched.run / "metrics.jsonl") if event["event"] == "fault"]
    return fault


def stacks_of(launched: Launched) -> dict[int, str]:
    """The stacks that were written down, by rank."""
    return {int(path.stem.removeprefix("rank-")): path.read_text() for path in launched.run.glob("faults/*/rank-*.txt")}


def assert_named(launched: Launched, rank: int, host: str) -> None:
    """Rank, host and the last update are on the screen and in the record."""
    fault = fault_of(launched)
    assert (fault["rank"], fault["host"]) == (rank, host)
    assert f"rank {rank} on {host}" in fault["message"] and f"after update {fault['step']:,}" in fault["message"]
    assert fault["message"] in launched.output and "did not finish" in launched.output
    assert fault["step"] >= 3


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_is_killed(rank, training, cluster):
    launched = training()
    host = cluster.hosts[rank // 2]
    began = time.monotonic()
    os.kill(host.ranks()[rank], signal.SIGKILL)
    assert launched.code() not in (0, STOPPED), launched.output
    wait_until_nothing_is_left(cluster.hosts, 5)
    assert time.monotonic() - began < 20 + SLACK
    assert_named(launched, rank, host.name)
    assert {0, 1, 2, 3} - {rank} >= stacks_of(launched).keys() != set()


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_that_is_stopped(rank, training, cluster):
    launched = training()
    host = cluster.hosts[rank // 2]
    began = time.monotonic()
    os.kill(host.ranks()[rank], signal.SIGSTOP)
    assert launched.code() not in (0, STOPPED), launched.output
    wait_until_nothing_is_left(cluster.hosts, 5)
    assert time.monotonic() - began < SILENT + 10 + SLACK
    assert "state T (stopped)" in launched.output and "is killed" in launched.output
    assert_named(launched, rank, host.name)
    stacks = stacks_of(launched)
    assert stacks.keys() == {0, 1, 2, 3} - {rank}
    for text in stacks.values():
        assert "most recent call first" in text and "in _train" in text
        # what needs all ranks: the gradients' average, or at a report the losses' sum
        assert 'pipeline/overlap.py", line' in text or 'pipeline/sums.py", line' in text
        assert "positions" in text and "samples" in text
    assert f"last heard of rank {rank}" in stacks[0]


def test_a_cable_that_is_pulled(training, cluster):
    launched = training()
    began = time.monotonic()
    cluster.hosts[1].disconnect()
    wait_until_nothing_is_left(cluster.hosts[1:], SILENT + 30 + SLACK)
    on_the_far_side = time.monotonic() - began
    assert launched.code() not in (0, STOPPED), launched.output
    wait_until_nothing_is_left(cluster.hosts, 5)
    assert time.monotonic() - began < 60 + SLACK
    assert on_the_far_side < SILENT + 30 + SLACK, "the host that is cut off ends its ranks itself"
    fault = fault_of(launched)
    assert fault["kind"] == "silent" and fault["host"] == "node-1" and fault["rank"] in (2, 3)
    assert {0, 1} <= stacks_of(launched).keys()


def test_a_host_that_reboots(training, cluster):
    launched = training()
    began = time.monotonic()
    cluster.hosts[1].kill_all()
    assert launched.code() not in (0, STOPPED), launched.output
    wait_until_nothing_is_left(cluster.hosts, 5)
    assert time.monotonic() - began < 60
    fault = fault_of(launched)
    assert fault["host"] == "node-1" and fault["rank"] in (2, 3)
    cluster.hosts[1].boot()


@pytest.mark.skipif(shutil.which("sshfs") is None or not Path("/dev/fuse").exists(), reason="needs sshfs and FUSE")
def test_storage_that_hangs(training, cluster, tiny_shards):
    """The second host reads its shards over a network file system whose server stops answering."""
    first, second = cluster.hosts
    server = "sftp_server=/usr/lib/openssh/sftp-server"
    second.run(["sshfs", "-o", "direct_io", "-o", server, f"{first.name}:{tiny_shards}", tiny_shards], check=True)
    try:
        launched = training()
        [connection] = [pid for pid in second.pids() if words_of(pid)[0] == "ssh"]
        began = time.monotonic()
        os.kill(connection, signal.SIGSTOP)
        launched.wait_until(lambda: "no rank has got any further" in launched.output, STUCK + 5 + SLACK)
        # a process inside such a read cannot be killed by anybody: the launch is ended without it
        assert launched.code() not in (0, STOPPED), launched.output
        assert time.monotonic() - began < STUCK + 90 + SLACK
        fault = fault_of(launched)
        assert (fault["kind"], fault["host"]) == ("stuck", "node-1")
        assert "rank 2 on node-1" in fault["message"] and "waiting for data" in fault["message"]
        assert stacks_of(launched).keys() == {0, 1, 2, 3}
        assert "_native" in stacks_of(launched)[2] or "read" in stacks_of(launched)[2]
        os.kill(connection, signal.SIGCONT)
        wait_until_nothing_is_left(cluster.hosts, 20)
    finally:
        second.run(["umount", "--lazy", tiny_shards])


def words_of(pid: int) -> list[str]:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def test_a_sigterm_saves_on_all_hosts_after_the_same_update(training, cluster):
    launched = training()
    launched.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert launched.code() == STOPPED, launched.output
    assert time.monotonic() - began < 10 + SLACK
    wait_until_nothing_is_left(cluster.hosts, 5)
    [saved] = launched.run.glob("checkpoints/step-*")
    updates = read_samples(launched.run)
    assert list(updates) == list(range(int(saved.name.removeprefix("step-"))))
    assert all(len(update.ids) == 96 for update in updates.values()), "every rank did the last one"


@pytest.mark.parametrize("rank", [0, 3])
def test_a_sigterm_to_one_rank_saves_on_all_hosts(rank, training, cluster):
    """As a scheduler sends it to the processes of one host."""
    launched = training()
    os.kill(cluster.hosts[rank // 2].ranks()[rank], signal.SIGTERM)
    assert launched.code() == STOPPED, launched.output
    wait_until_nothing_is_left(cluster.hosts, 5)
    [saved] = launched.run.glob("checkpoints/step-*")
    updates = read_samples(launched.run)
    assert list(updates) == list(range(int(saved.name.removeprefix("step-"))))
    assert all(len(update.ids) == 96 for update in updates.values())


def launcher_pid(cluster: Cluster, what: str) -> int:
    """The process of a launcher on the first host."""
    return min(pid for pid in cluster.hosts[0].pids() if any(word.endswith(what) for word in words_of(pid)[:5]))


@pytest.mark.parametrize("what", ["onehour", "bin/deepspeed", "pdsh"])
def test_a_launcher_that_is_killed_leaves_nothing_behind_and_nothing_unsaved(what, training, cluster):
    launched = training()
    began = time.monotonic()
    os.kill(launched.process.pid if what == "onehour" else launcher_pid(cluster, what), signal.SIGKILL)
    assert launched.code() != 0, launched.output
    wait_until_nothing_is_left(cluster.hosts, 30 + SLACK)
    assert time.monotonic() - began < 40 + SLACK
    [saved] = launched.run.glob("checkpoints/step-*")
    assert json.loads((saved / "state.json").read_text())["step"] >= 3


def test_a_launcher_of_one_host_that_is_killed(training, cluster):
    """DeepSpeed's own process on the second host, as by a kernel that is out of memory."""
    launched = training()
    for pid in cluster.hosts[1].pids():
        if "deepspeed.launcher.launch" in words_of(pid):
            os.kill(pid, signal.SIGKILL)
    assert launched.code() not in (0, STOPPED), launched.output
    wait_until_nothing_is_left(cluster.hosts, 5)
    assert "the launcher of this host is gone" in launched.output
