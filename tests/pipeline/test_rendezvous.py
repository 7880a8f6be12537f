"""Every launcher's words for who is who: real environments, as srun, mpirun and torchrun gave or give them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.rendezvous import LOOPBACK, Rendezvous, discover, expand_counts, expand_hosts, interface_towards
from shards.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DUMP = """
import json, os, pathlib, sys
from dataclasses import astuple
from pipeline.rendezvous import discover
pathlib.Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(astuple(discover(os.environ))))
"""

# of Slurm 22.05: a batch script with 3 hosts and 7 tasks on them, and in it `srun`, then `srun -N2 -n2 -w node[09-10]`
BATCH = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "node[08-10]",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "node[08-10]",
    "SLURM_NPROCS": "7",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "4,2,1",
}
TASK_5 = {
    **BATCH,
    "SLURM_DISTRIBUTION": "block",
    "SLURM_GTIDS": "4,5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "5",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[08-10]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,2,1",
}
SMALL_STEP = {
    **BATCH,
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "node[09-10]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
SALLOC_SHELL = {  # with LaunchParameters=use_interactive_step
    **BATCH,
    "SLURM_PTY_PORT": "33717",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "node08",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
TORCHRUN = {  # node 1 of 2, 2 processes each
    "GROUP_RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node08",
    "MASTER_PORT": "29400",
    "RANK": "3",
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "4",
}
HYDRA = {"PMI_FD": "6", "PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "PMIX_NAMESPACE": "1714683905",
}


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        discover(environ)
    return str(caught.value)


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


# ---------------------------------------------------------------- none


def test_without_a_launcher_a_group_of_one():
    found = discover({"HOME": "/root"})
    assert (found.rank, found.size, found.local_rank, found.local_size) == (0, 1, 0, 1)
    assert (found.master_addr, found.launcher) == (LOOPBACK, "none")
    assert 1024 < found.master_port < 65536


# ---------------------------------------------------------------- torch's own variables


def test_torchrun():
    assert discover(TORCHRUN) == Rendezvous(3, 4, 1, 2, "node08", 29400, "torchrun")


def test_deepspeed():
    environ = {
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "RANK": "8",
        "WORLD_SIZE": "16",
    }
    assert discover(environ) == Rendezvous(8, 16, 0, 8, "10.0.0.1", 29500, "deepspeed")


def test_local_ranks_that_nobody_counted():
    given = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "1234"}
    on_this_host = discover({**given, "MASTER_ADDR": "127.0.0.1"})
    assert (on_this_host.local_rank, on_this_host.local_size) == (1, 4)
    pod = discover({**given, "MASTER_ADDR": "job-master-0"})
    assert (pod.local_rank, pod.local_size) == (0, 1)
    alone = discover({"RANK": "0", "WORLD_SIZE": "1"})
    assert (alone.local_size, alone.master_addr) == (1, LOOPBACK)
    assert "LOCAL_SIZE" in refusal({**given, "MASTER_ADDR": "node08", "LOCAL_RANK": "1"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"])
def test_a_missing_variable_is_named(name):
    assert refusal(without(TORCHRUN, name)).startswith(f"{name} is missing")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RANK", "4", "rank 4 of 4"),
        ("RANK", "-1", "RANK=-1"),
        ("RANK", "three", "RANK=three"),
        ("RANK", "²", "RANK=²"),
        ("RANK", "", "RANK is missing"),
        ("RANK", "0", "local rank 1 of 2"),
        ("LOCAL_RANK", "2", "local rank 2 of 2"),
        ("LOCAL_WORLD_SIZE", "5", "of 5 on this host contradicts rank 3 of 4"),
        ("MASTER_PORT", "0", "MASTER_PORT=0"),
        ("MASTER_PORT", "65536", "MASTER_PORT=65536"),
    ],
)
def test_contradictions_are_named(name, value, said):
    assert said in refusal({**TORCHRUN, name: value})


def test_the_inner_launcher_counts():
    assert discover({**TASK_5, **TORCHRUN}).launcher == "torchrun"
    assert discover({**OPEN_MPI, **TORCHRUN}).launcher == "torchrun"
    # mpirun in a job starts its daemons by srun, whose task ids the ranks inherit
    assert discover({**TASK_5, **OPEN_MPI, "MASTER_ADDR": "node08"}).rank == 3
    assert discover({**TASK_5, **HYDRA, "MASTER_ADDR": "node08"}).rank == 3
    # srun --mpi=pmi2 gives its tasks an MPI rank as well
    assert discover({**TASK_5, "PMI_RANK": "5", "PMI_SIZE": "7"}).launcher == "Slurm"


# ---------------------------------------------------------------- srun


def test_tasks_of_a_step():
    assert discover(TASK_5) == Rendezvous(5, 7, 1, 2, "node08", 15_002, "Slurm")
    assert discover(SMALL_STEP) == Rendezvous(1, 2, 0, 1, "node09", 16_002, "Slurm"), "the step's hosts, not the job's"


def test_tasks_of_one_host_need_no_name():
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    one_host = {**TASK_5, **step, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    assert discover(one_host).master_addr == LOOPBACK


def test_jobs_and_their_steps_meet_on_ports_of_their_own():
    ports = {
        discover({**TASK_5, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(12_345_600, 12_345_700)
        for step in range(3)
    }
    assert len(ports) == 300
    assert min(ports) >= 15_000 and max(ports) < 25_000


def test_place_and_port_may_be_given():
    found = discover({**TASK_5, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4000"})
    assert (found.master_addr, found.master_port) == ("10.1.1.1", 4000)


@pytest.mark.parametrize("shell", [BATCH, SALLOC_SHELL, without(BATCH, "SLURM_PROCID", "SLURM_LOCALID")])
def test_what_srun_did_not_start_is_no_task(shell):
    assert "srun python -m pipeline.train" in refusal(shell)
    assert discover({**shell, "SLURM_NTASKS": "1"}).launcher == "none", "nothing else was asked for"
    assert discover(without(shell, "SLURM_NTASKS")).launcher == "none"


def test_tasks_dealt_out_in_turn_are_refused():
    assert "--distribution=block" in refusal({**TASK_5, "SLURM_PROCID": "4", "SLURM_LOCALID": "1"})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLURM_STEP_TASKS_PER_NODE", "4,2", "SLURM_STEP_TASKS_PER_NODE=4,2 contradicts"),
        ("SLURM_NODEID", "3", "SLURM_NODEID=3"),
        ("SLURM_STEP_TASKS_PER_NODE", "4,,3", "4,,3: not a list of counts"),
        ("SLURM_STEP_NODELIST", "node[08-", "node[08-: not a list of hosts"),
        ("SLURM_PROCID", "7", "task 7 is number 1 of host 1"),
        ("SLURM_STEP_NUM_TASKS", "", "SLURM_STEP_NUM_TASKS is missing"),
    ],
)
def test_contradictions_of_slurm_are_named(name, value, said):
    assert said in refusal({**TASK_5, name: value})


@pytest.mark.parametrize(
    ("text", "names"),  # as `scontrol show hostnames` gives them
    [
        ("a", "a"),
        ("node[7]", "node7"),
        ("node[01-04,7],x", "node01 node02 node03 node04 node7 x"),
        ("n[098-101],n[1-3,5]x[0-1]", "n098 n099 n100 n101 n1x0 n1x1 n2x0 n2x1 n3x0 n3x1 n5x0 n5x1"),
        ("gpu-a.x,gpu-b[8-10]", "gpu-a.x gpu-b8 gpu-b9 gpu-b10"),
    ],
)
def test_lists_of_hosts(text, names):
    assert list(expand_hosts(text)) == names.split()


@pytest.mark.parametrize(
    "text", ["", "a,", "a[", "a[]", "a[1-]", "a[1-2", "a]1[", "a[x]", "a{1,2}", "a b", "n" * 500 + "["]
)
def test_what_is_no_list_of_hosts_is_refused(text):
    with pytest.raises(UserError, match="not a list of hosts"):
        list(expand_hosts(text))


def test_the_first_of_a_million_hosts_is_found_at_once():
    assert next(expand_hosts("r[0000-9999]n[00-99]")) == "r0000n00"


def test_lists_of_counts():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("8") == [8]
    for text in ("", "2(x)", "2x3", "2(3)", "a"):
        with pytest.raises(UserError, match="not a list of counts"):
            expand_counts(text)


# ---------------------------------------------------------------- MPI


@pytest.mark.parametrize("environ", [OPEN_MPI, HYDRA])
def test_mpi_on_several_hosts_needs_the_first_ones_address(environ):
    message = refusal(environ)
    assert "mpirun -x MASTER_ADDR=" in message and "mpiexec -genv MASTER_ADDR" in message
    assert "127.0.1.1" in refusal({**environ, "MASTER_ADDR": "127.0.1.1"}), "as Debian's hosts know themselves"
    found = discover({**environ, "MASTER_ADDR": "node08", "MASTER_PORT": "4000"})
    assert (found.rank, found.size, found.local_rank, found.local_size) == (3, 4, 0, 1)
    assert (found.master_addr, found.master_port) == ("node08", 4000)


def test_mpi_that_does_not_say_who_shares_a_host_is_refused():
    assert "PMI_SIZE=4" in refusal({"PMI_RANK": "1", "PMI_SIZE": "4"})
    assert discover({"PMI_RANK": "0", "PMI_SIZE": "1"}).launcher == "none"


def start(folder: Path, *command: str) -> list[Rendezvous]:
    """What each process that a real launcher starts finds in its environment, by rank."""
    folder.mkdir()
    script = folder / "dump.py"
    script.write_text(DUMP)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PMI", "OMPI"))}
    done = subprocess.run(
        [*command, str(script), str(folder)],
        env={**variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [Rendezvous(*json.loads(path.read_text())) for path in folder.glob("*.json")]
    return sorted(found, key=lambda one: one.rank)


def check_four_on_this_host(found: list[Rendezvous], launcher: str) -> None:
    assert [(one.rank, one.size, one.local_rank, one.local_size) for one in found] == [(r, 4, r, 4) for r in range(4)]
    assert len({(one.master_addr, one.master_port) for one in found}) == 1
    assert {one.launcher for one in found} == {launcher}


@pytest.mark.launcher
def test_real_mpirun(tmp_path):
    """Two jobs on this machine, without mpi4py: each with a port of its own."""
    mpirun = shutil.which("mpirun.openmpi")
    if mpirun is None:
        pytest.skip("Open MPI is not installed")
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "-np", "4", sys.executable]
    jobs = [start(tmp_path / name, *command) for name in "ab"]
    for found in jobs:
        check_four_on_this_host(found, "Open MPI")
        assert found[0].master_addr == LOOPBACK
    assert jobs[0][0].master_port != jobs[1][0].master_port


@pytest.mark.launcher
def test_real_mpiexec(tmp_path):
    mpiexec = shutil.which("mpiexec.hydra")
    if mpiexec is None:
        pytest.skip("MPICH is not installed")
    check_four_on_this_host(start(tmp_path / "a", mpiexec, "-n", "4", sys.executable), "MPICH")


@pytest.mark.launcher
def test_real_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    check_four_on_this_host(start(tmp_path / "a", *torchrun), "torchrun")


# ---------------------------------------------------------------- the way to rank 0


def test_interface_towards_this_machines_addresses():
    """An address of one's own is reached by the loopback, but other hosts reach it by the interface that has it."""
    checked = 0
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family.name in ("AF_INET", "AF_INET6"):
                own = entry.address.partition("%")[0]
                if own.startswith("fe80"):
                    continue
                loopback = own.startswith("127.") or own == "::1"
                assert interface_towards(own, 29500) == (None if loopback else name)
                checked += 1
    assert checked > 0


def test_interface_towards_loopback_is_none():
    assert interface_towards("localhost", 29500) is None
    assert interface_towards("127.0.1.1", 29500) is None


def test_a_host_that_nobody_knows_is_named():
    with pytest.raises(UserError, match=r"MASTER_ADDR=no-such-host\.invalid"):
        interface_towards("no-such-host.invalid", 29500)
