"""Where this process stands among the ranks, from the environment that its launcher gave it, and how ranks meet.

deepspeed and torchrun say everything. MPI's mpirun says who is who, but not where rank 0 is; srun says it in its own
words. None of them needs a library of theirs: plain `srun` and `mpirun python -m pipeline.train CONFIG` will do.

Launchers run inside one another, and the inner one counts: torchrun as srun's task, mpirun whose daemons srun starts.
So RANK and WORLD_SIZE win, then MPI's variables, then Slurm's.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil
from braceexpand import braceexpand

from pipeline.hosts import free_port
from shards.errors import UserError

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # torch's and deepspeed's, for jobs that have nothing to tell them apart by
FIRST_PORT, PORTS = 15_000, 10_000  # below those that systems give to outgoing connections
WORLD = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
MPI = {
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{name}" for name in WORLD),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{name}" for name in WORLD),
}
"""Rank, size, local rank and local size, as each names them; Intel MPI does as MPICH."""
SLURM_SHELL_STEP = 0xFFFFFFF0  # steps from here on are no srun's: salloc's shell, a batch script
_RANGE = r"\d+(?:-\d+)?"
_HOSTS = rf"(?:[^][{{}},\s]++|\[{_RANGE}(?:,{_RANGE})*\])+"
HOST_LIST = re.compile(f"{_HOSTS}(?:,{_HOSTS})*", re.ASCII)


@dataclass(frozen=True)
class Rendezvous:
    """This process among the ranks, and where they meet.

    Attributes:
        rank: of this process, below `size`.
        size: W, the number of ranks.
        local_rank: among the ranks of this host, below `local_size`.
        local_size: ranks of this host.
        master_addr: name or address of the host of rank 0, as the other hosts know it.
        master_port: the TCP port on which rank 0 waits for the others.
        launcher: who started this process, for people; "none" for a group of one.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    launcher: str

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UserError(f"{self.launcher}: rank {self.rank} of {self.size}; ranks count from 0")
        if not 0 <= self.local_rank < self.local_size or self.local_rank > self.rank or self.local_size > self.size:
            raise UserError(
                f"{self.launcher}: local rank {self.local_rank} of {self.local_size} on this host contradicts "
                f"rank {self.rank} of {self.size}"
            )
        if not 0 < self.master_port < 65536:
            raise UserError(f"MASTER_PORT={self.master_port} is not a port")


def discover(environ: Mapping[str, str]) -> Rendezvous:
    """Read what deepspeed, torchrun, mpirun (Open MPI, MPICH, Intel MPI, MVAPICH) or srun says; else a group of one.

    MASTER_ADDR and MASTER_PORT are taken where they are given, whoever the launcher is.

    Raises:
        UserError: variables are missing, contradict each other, or are not numbers; ranks on several hosts cannot
            know where rank 0 is; a process that srun should have started was not.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _explicit(environ)
    for launcher, names in MPI.items():
        # PMI_RANK alone may be srun's
        if names[0] in environ and names[2] in environ:
            return _mpi(environ, launcher, names)
    if "SLURM_PROCID" in environ and _number(environ, "SLURM_STEP_ID", SLURM_SHELL_STEP) < SLURM_SHELL_STEP:
        return _slurm(environ)
    if _number(environ, "PMI_SIZE", 1) > 1:
        raise UserError(
            f"PMI_SIZE={environ['PMI_SIZE']}: MPI started this process, and does not say which ranks share a host",
            "MPI_LOCALRANKID and MPI_LOCALNRANKS are missing. Give every process RANK, WORLD_SIZE, LOCAL_RANK, "
            "LOCAL_SIZE, MASTER_ADDR and MASTER_PORT.",
        )
    if "SLURM_JOB_ID" in environ and _number(environ, "SLURM_NTASKS", 1) > 1:
        raise UserError(
            f"SLURM_NTASKS={environ['SLURM_NTASKS']}: the job has tasks, and this process is none of them",
            "A batch script and salloc's shell run a command once. Start the ranks with:",
            "srun python -m pipeline.train CONFIG",
        )
    return Rendezvous(0, 1, 0, 1, LOOPBACK, free_port(), "none")


def _explicit(environ: Mapping[str, str]) -> Rendezvous:
    """deepspeed, torchrun, or whoever else sets torch's own variables."""
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    else:
        launcher = "deepspeed" if "CROSS_RANK" in environ else "the environment"
    rank, size = (_number(environ, name) for name in ("RANK", "WORLD_SIZE"))
    alone = size == 1
    if not alone:
        _require(environ, "MASTER_ADDR")
    address = environ.get("MASTER_ADDR") or LOOPBACK
    given = "LOCAL_SIZE" if "LOCAL_SIZE" in environ else "LOCAL_WORLD_SIZE"
    if given in environ:
        local_rank, local_size = _number(environ, "LOCAL_RANK"), _number(environ, given)
    elif alone or _is_loopback(address):
        local_rank, local_size = rank, size
    elif "LOCAL_RANK" in environ:
        raise UserError(
            "LOCAL_RANK is in the environment, and neither LOCAL_SIZE nor LOCAL_WORLD_SIZE",
            "Give the number of ranks of this host as LOCAL_SIZE.",
        )
    else:
        local_rank, local_size = 0, 1  # a process per host, as Kubernetes' PyTorchJob has it
    port = _number(environ, "MASTER_PORT") if "MASTER_PORT" in environ or not alone else free_port()
    return Rendezvous(rank, size, local_rank, local_size, address, port, launcher)


def _mpi(environ: Mapping[str, str], launcher: str, names: Sequence[str]) -> Rendezvous:
    rank, size, local_rank, local_size = (_number(environ, name) for name in names)
    address = environ.get("MASTER_ADDR") or (LOOPBACK if local_size == size else "")
    if not address or (_is_loopback(address) and local_size < size):
        # mpirun's own address is in no variable that all versions set, and rank 0 need not be on mpirun's host
        raise UserError(
            f"{launcher}: ranks on several hosts, and MASTER_ADDR "
            + (f"is {address}, which on each of them is itself" if address else "does not say where rank 0 is"),
            "Give them the name or address of the first host:",
            "mpirun -x MASTER_ADDR=HOST …   (Open MPI)",
            "mpiexec -genv MASTER_ADDR HOST …   (MPICH, Intel MPI)",
        )
    job = environ.get("PMIX_NAMESPACE")
    derived = FIRST_PORT + zlib.crc32(job.encode()) % PORTS if job else DEFAULT_PORT
    return Rendezvous(rank, size, local_rank, local_size, address, _number(environ, "MASTER_PORT", derived), launcher)


def _slurm(environ: Mapping[str, str]) -> Rendezvous:
    """A task of an srun; the step's variables, because a step may use a part of the job's allocation."""
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    local_rank, node = _number(environ, "SLURM_LOCALID"), _number(environ, "SLURM_NODEID")
    tasks = expand_counts(_require(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(tasks) or sum(tasks) != size:
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} contradicts SLURM_NODEID={node} or "
            f"SLURM_STEP_NUM_TASKS={size}"
        )
    if rank != sum(tasks[:node]) + local_rank:
        raise UserError(
            f"Slurm: task {rank} is number {local_rank} of host {node}: tasks were dealt out to the hosts in turn",
            "Ranks that share a host must follow one another: srun --distribution=block …",
        )
    first = LOOPBACK if len(tasks) == 1 else next(expand_hosts(_require(environ, "SLURM_STEP_NODELIST")))
    address = environ.get("MASTER_ADDR") or first
    # jobs, and the steps of a job, may share a host
    number = _number(environ, "SLURM_JOB_ID") + 1000 * _number(environ, "SLURM_STEP_ID")
    port = _number(environ, "MASTER_PORT", FIRST_PORT + number % PORTS)
    return Rendezvous(rank, size, local_rank, tasks[node], address, port, "Slurm")


def expand_hosts(hosts: str) -> Iterator[str]:
    """The names that Slurm's "node[01-04,7],x" stands for, in its order: those of `scontrol show hostnames`.

    Raises:
        UserError: it is not of that form.
    """
    if HOST_LIST.fullmatch(hosts) is None:
        raise UserError(f"{hosts}: not a list of hosts as Slurm writes it, e.g. node[01-04,7],x")
    for entry in re.split(r",(?![^[]*\])", hosts):
        yield from braceexpand(re.sub(r"\[([^]]*)\]", _in_braces, entry), escape=False)


def _in_braces(ranges: re.Match[str]) -> str:
    """[01-04,7] as a shell writes it: {{01..04},7}."""
    parts = re.sub(r"(\d+)-(\d+)", r"{\1..\2}", ranges[1])
    return f"{{{parts}}}" if "," in parts else parts


def expand_counts(counts: str) -> list[int]:
    """The numbers that Slurm's "2(x3),1" stands for: 2, 2, 2, 1.

    Raises:
        UserError: it is not of that form.
    """
    found: list[int] = []
    for text in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", text, re.ASCII)
        if match is None:
            raise UserError(f"{counts}: not a list of counts as Slurm writes it, e.g. 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def interface_towards(address: str, port: int) -> str | None:
    """The network interface by which this machine reaches an address, e.g. "eth0"; nothing is sent.

    Args:
        address: name or address of a host; of this one, the interface that has the address.
        port: any port of it.

    Returns:
        Its name as `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME` take it, or None where the address leads to the
        loopback.

    Raises:
        UserError: the name is unknown here, or no route leads there.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address}: {socket.gethostname()} does not know this host: {error}",
            "Every host must be able to look it up (DNS or /etc/hosts); an address works as well.",
        ) from None
    refused: OSError | None = None
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                own = probe.getsockname()[0]
        except OSError as error:
            refused = error
            continue
        return _interface_of(own)
    raise UserError(f"MASTER_ADDR={address}: no way leads there from {socket.gethostname()}: {refused}")


def _interface_of(own: str) -> str | None:
    if _is_loopback(own):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own.partition("%")[0] for entry in addresses):
            return name
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


def _require(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        others = [other for other in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID") if other in environ]
        raise UserError(
            f"{name} is missing from the environment" + f", which has {' and '.join(others)}" * bool(others),
            "A launcher sets all that is needed: deepspeed, torchrun, srun or mpirun.",
            "To train in one process, unset what another launcher or a container's image left there.",
        )
    return value


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environ.get(name):
        return default
    value = _require(environ, name)
    if not (value.isascii() and value.isdecimal()):
        raise UserError(f"{name}={value} in the environment is not a number")
    return int(value)
