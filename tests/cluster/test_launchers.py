"""The same JSON under every launcher that can be had here: the same training, stopped, killed and continued."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.fault import STOPPED
from pipeline.metrics import read_metrics
from pipeline.samples import read_samples
from tests.cluster.hosts import Cluster, Host
from tests.cluster.launched import KN, ONEHOUR_TRAIN, Launched, configure, tidy, wait_until_nothing_is_left
from tests.training import TOLERANCE, TRAIN, assert_the_run_is_exact, assert_the_same_training, run_of

pytestmark = [pytest.mark.root, pytest.mark.launcher, pytest.mark.timeout(900)]

RANK = ("-m", "pipeline.train")
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
MEETING = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "node-0:29400", "--rdzv-id", "imagenet-1")
LAUNCHERS = {
    "onehour": (*ONEHOUR_TRAIN, "--ranks", "2"),
    "deepspeed": (sys.executable, DEEPSPEED, "--num_accelerators", "2", "--module", "pipeline.train"),
    "torchrun": (*TORCHRUN, "--nproc-per-node", "2", *RANK),
    "torchrun-c10d": (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *MEETING, *RANK),
    "mpirun": ("mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, *RANK),
}
ON_TWO_HOSTS = ("torchrun-c10d",)
ENDLESS = {
    "recipe.epochs": 100_000,
    "scheduler.params.milestones": [],
    "recipe.checkpoint.every_epochs": 50_000,
    "recipe.evaluation.every_epochs": 100_000,
}
DONE = 3  # updates before anything happens


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: apt install openmpi-bin)")
    return make_cluster(2, nics=("eth0", "ens5"))


@pytest.fixture(autouse=True)
def _tidy(cluster: Cluster) -> Iterator[None]:
    with tidy(cluster):
        yield


def launch(name: str, path: Path, cluster: Cluster) -> list[Launched]:
    """Start it under a launcher, on the hosts that this one takes: one launcher on each."""
    hosts = cluster.hosts if name in ON_TWO_HOSTS else cluster.hosts[:1]
    return [Launched(host, path, command=LAUNCHERS[name]) for host in hosts]


def ranks_on(host: Host) -> list[int]:
    """Pids of the ranks, whoever started them."""
    found = []
    for pid in host.pids():
        with contextlib.suppress(psutil.Error):
            words = psutil.Process(pid).cmdline()
            if "-m" in words and words[words.index("-m") + 1] == "pipeline.train" and "python" in words[0]:
                found.append(pid)
    return found


def rank_of(pid: int) -> int:
    """Of a rank's process, by its launcher's variable."""
    variables = psutil.Process(pid).environ()
    return int(variables.get("RANK") or variables["OMPI_COMM_WORLD_RANK"])


def wait_for_updates(launched: list[Launched]) -> None:
    """Wait until both ranks have done some."""
    samples = launched[0].run / "samples"

    def done() -> bool:
        records = list(samples.glob("from-0-rank-*-of-2.jsonl"))
        return len(records) == 2 and all(record.read_bytes().count(b"\n") >= DONE for record in records)

    launched[0].wait_until(done)


@pytest.fixture(scope="module")
def under_onehour(cluster: Cluster, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = configure(tiny_shards, tmp_path_factory.mktemp("onehour"), "onehour")
    launch("onehour", path, cluster)[0].output_of()
    return path


@pytest.mark.parametrize("name", ["deepspeed", "torchrun", "torchrun-c10d", "mpirun"])
def test_the_same_training_under_every_launcher(name, under_onehour, cluster, tiny_shards, tmp_path):
    path = configure(tiny_shards, tmp_path, name)
    for launched in launch(name, path, cluster):
        launched.output_of()
    assert_the_same_training([under_onehour, path], TOLERANCE)
    [start] = [event for event in read_metrics(run_of(path) / "metrics.jsonl") if event["event"] == "start"]
    assert start["world_size"] == 2
    wait_until_nothing_is_left(cluster.hosts, 5)


@pytest.mark.parametrize("name", ["torchrun", "torchrun-c10d", "mpirun"])
def test_a_sigterm_saves_after_the_same_update_and_the_next_launch_goes_on(name, cluster, tiny_shards, tmp_path):
    path = configure(tiny_shards, tmp_path, "stopped", ENDLESS)
    launched = launch(name, path, cluster)
    wait_for_updates(launched)
    if name == "mpirun":  # it kills its ranks two seconds after it is told to stop: they are told themselves
        for pid in ranks_on(cluster.hosts[0]):
            os.kill(pid, signal.SIGTERM)
    else:
        launched[-1].process.send_signal(signal.SIGTERM)  # one of them is enough
    for each in launched:
        assert each.code() == (STOPPED if name == "mpirun" else 1), each.output
    wait_until_nothing_is_left(cluster.hosts, 5)
    [saved] = run_of(path).glob("checkpoints/step-*")
    step = int(saved.name.removeprefix("step-"))
    updates = read_samples(run_of(path))
    assert list(updates) == list(range(step)) and step >= DONE
    assert all(len(update.ids) == KN for update in updates.values()), "every rank did the last one"

    epochs = -(-(step + DONE) * KN // TRAIN)
    path = configure(tiny_shards, tmp_path, "stopped", {**ENDLESS, "recipe.epochs": epochs})
    for each in launch(name, path, cluster):
        each.output_of()
    assert_the_run_is_exact(run_of(path), path)
    [resumed] = [event for event in read_metrics(run_of(path) / "metrics.jsonl") if event["event"] == "resume"]
    assert resumed["samples"] == step * KN
    np.testing.assert_array_equal(read_samples(run_of(path))[step - 1].ids, updates[step - 1].ids)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["torchrun", "torchrun-c10d", "mpirun"])
def test_a_rank_that_is_killed_ends_all(name, rank, cluster, tiny_shards, tmp_path):
    path = configure(tiny_shards, tmp_path, "killed", ENDLESS)
    launched = launch(name, path, cluster)
    wait_for_updates(launched)
    host = cluster.hosts[rank if name in ON_TWO_HOSTS else 0]
    pids = sorted(ranks_on(host), key=rank_of)
    os.kill(pids[0 if name in ON_TWO_HOSTS else rank], signal.SIGKILL)
    began = time.monotonic()
    for each in launched:
        assert each.code(60) not in (0, STOPPED), each.output
    wait_until_nothing_is_left(cluster.hosts, 5)
    assert time.monotonic() - began < 60
    assert not list(run_of(path).glob("checkpoints/step-*")), "what one rank alone has is not saved"
