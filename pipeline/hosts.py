"""Where a launch puts its ranks: the hostfile and its filters, this machine's GPUs, and what other hosts need.

DeepSpeed's launcher trains locally when the hostfile does not exist, and finds most other mistakes only after it has
begun; the same files and options are read here first, by its own rules (deepspeed/launcher/runner.py).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.errors import UserError

HOST_LINE = re.compile(r"^(\S+)\s+slots=(\d+)\s*(?:#.*)?$")
PLAIN_PATH = re.compile(r"^[\w@+=:,./-]+$")  # what means itself to a remote shell, and to pdsh (which expands %h)
GPU_LISTING_SECONDS = 60

LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich", "slurm")
LAUNCHER_OPTIONS = frozenset(  # those that take a value
    "--master_port --master_addr --node_rank --launcher --launcher_args --enable_each_rank_log --bind_core_list "
    "--ssh_port --venv_script --log_level".split()
)
LAUNCHER_FLAGS = frozenset(
    "--no_local_rank --no_ssh --no_ssh_check --force_multi --save_pid --bind_cores_to_rank --quiet -q".split()
)
# options of the launcher that would start other ranks than were planned, and ours that plans them
OURS = {
    "-H": "--hostfile",
    "--hostfile": "--hostfile",
    "-i": "--include",
    "--include": "--include",
    "-e": "--exclude",
    "--exclude": "--exclude",
    "--num_gpus": "--ranks",
    "--num_accelerators": "--ranks",
    "--num_nodes": "--include",
}


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the file's order.

    Raises:
        UserError: the file is missing or empty, or a line is not `host slots=N`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such hostfile",
            "The launcher alone would train on this machine only, with a warning.",
            "A hostfile has one line per host: worker-0 slots=8",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a hostfile: {error}") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = HOST_LINE.match(line)
        if match is None:
            raise UserError(f"{path}:{number}: {line!r} is not of the form: host slots=N")
        host, count = match[1], int(match[2])
        if host in slots:
            raise UserError(f"{path}:{number}: {host} is listed twice")
        if count == 0:
            raise UserError(f"{path}:{number}: {host} has no slots", "Remove the line, or give it slots.")
        slots[host] = count
    if not slots:
        raise UserError(f"{path}: the hostfile names no host", "One line per host: worker-0 slots=8")
    return slots


def select(slots: Mapping[str, int], include: str = "", exclude: str = "") -> dict[str, list[int]]:
    """Apply the launcher's `--include` or `--exclude` ("host-a@host-b:0,2").

    Returns:
        The slot numbers used, by host.

    Raises:
        UserError: both filters, an unknown host or slot, or nothing left.
    """
    if include and exclude:
        raise UserError("--include and --exclude cannot be used together")
    every = {host: list(range(count)) for host, count in slots.items()}
    named = _parse_filter(include or exclude, every, "--include" if include else "--exclude")
    if include:
        chosen = {host: named[host] for host in every if host in named}
    else:
        chosen = {
            host: [slot for slot in numbers if slot not in named.get(host, [])] for host, numbers in every.items()
        }
        chosen = {host: numbers for host, numbers in chosen.items() if numbers}
    if not chosen:
        raise UserError(f"--exclude {exclude}: no slot is left to train on")
    return chosen


def _parse_filter(text: str, every: Mapping[str, list[int]], option: str) -> dict[str, list[int]]:
    named: dict[str, set[int]] = {}
    for part in text.split("@") if text else []:
        host, colon, numbers = part.partition(":")
        if host not in every:
            raise UserError(f"{option} {text}: {host} is not in the hostfile", f"It has {', '.join(every)}.")
        try:
            wanted = {int(number) for number in numbers.split(",")} if colon else set()
        except ValueError:
            raise UserError(f"{option} {text}: slots are numbers: {host}:0,1") from None
        for slot in wanted:
            if slot not in every[host]:
                raise UserError(f"{option} {text}: {host} has slots 0 to {len(every[host]) - 1}, not {slot}")
        named.setdefault(host, set()).update(wanted)
    return {host: sorted(slots) or every[host] for host, slots in named.items()}


def include_option(chosen: Mapping[str, list[int]]) -> str:
    """The launcher's `--include` that selects just these slots."""
    return "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in chosen.items())


def local_gpus() -> list[int]:
    """Numbers of the GPUs that ranks on this machine may use, without importing torch; none means ranks on the CPU.

    `CUDA_VISIBLE_DEVICES` (empty or -1 for the CPU) and `DS_ACCELERATOR=cpu` are honoured; else `nvidia-smi` counts.

    Raises:
        UserError: `CUDA_VISIBLE_DEVICES` names GPUs in a way that the launcher does not take.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _visible_gpus(visible)
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=GPU_LISTING_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        # a machine whose driver hangs can train on its CPU, but who expects its GPUs must hear of it
        print(
            f"onehour: no GPU is counted: {error}\n"
            "  Where the GPUs work all the same, name them: CUDA_VISIBLE_DEVICES=0,1",
            file=sys.stderr,
        )
        return []
    return list(range(sum(line.startswith("GPU ") for line in listing.stdout.splitlines())))


def _visible_gpus(visible: str) -> list[int]:
    entries = [entry.strip() for entry in visible.split(",")]
    if entries in ([""], ["-1"]):
        return []
    if not all(entry.isascii() and entry.isdecimal() for entry in entries):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: the deepspeed launcher takes numbers of GPUs only, e.g. 0,1",
            "`nvidia-smi -L` lists the numbers; an empty value trains on the CPU.",
            "For a MIG slice, which has no number: torchrun --nproc-per-node 1 -m pipeline.train CONFIG",
        )
    numbers = [int(entry) for entry in entries]
    if len(set(numbers)) < len(numbers):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: a GPU is listed twice; the launcher would use it once")
    return numbers


def read_launcher_options(options: Sequence[str]) -> dict[str, str]:
    """The options that go to the deepspeed launcher as they are: values by name, "" for a flag.

    Raises:
        UserError: a stray word, which the launcher would take for its script; an option that would start other
            ranks than were planned; an option that the launcher does not have.
    """
    known = LAUNCHER_OPTIONS | LAUNCHER_FLAGS | OURS.keys()
    given: dict[str, str] = {}
    words = iter(options)
    for word in words:
        if not word.startswith("-"):
            mend = f"Did you mean --set {word}?" if "=" in word else "The launcher would take it for the script to run."
            raise UserError(f"{word}: not an argument of onehour train", mend)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            name = name[:2] if name[:2] in OURS else name  # -Hfile is -H file
        elif name not in known:
            # like argparse, which the launcher reads them with
            full = [option for option in known if option.startswith(name)]
            name = full[0] if len(full) == 1 else name
        if name in OURS:
            raise UserError(
                f"{word}: chooses ranks behind the plan's back",
                f"Use onehour's own {OURS[name]}" + " host-a@host-b" * (name == "--num_nodes"),
            )
        if name not in known:
            raise UserError(
                f"{word}: neither onehour train nor the launcher under it takes such an option",
                "onehour train --help lists ours; a value of the configuration is set by --set PATH=VALUE.",
            )
        given[name] = value if equals or name in LAUNCHER_FLAGS else next(words, "")
    return given


def check_remote(launcher: str, config: Path) -> None:
    """Check what the launcher needs before it can start ranks on other hosts.

    Args:
        launcher: its `--launcher`, one of `LAUNCHERS`.
        config: the configuration's path, which every host is given.

    Raises:
        UserError: an unknown launcher; no pdsh; a path that a remote shell would split or expand.
    """
    if launcher not in LAUNCHERS:
        raise UserError(f"--launcher {launcher}: the launcher has {', '.join(LAUNCHERS)}")
    if launcher != "pdsh":
        return  # the others start no shell
    paths = {"the working directory": Path.cwd(), "the configuration": config, "the Python": Path(sys.executable)}
    for what, path in paths.items():
        if not PLAIN_PATH.match(str(path)):
            raise UserError(
                f"{path}: pdsh hands the path of {what} to a shell on every host, which would take it apart",
                "Use a path of letters, digits and ./_-+=:,@ without blanks, or another --launcher.",
            )
    if shutil.which("pdsh") is None:
        raise UserError(
            "pdsh is not on PATH here, and the launcher starts ranks on other hosts with it",
            f"Install it (Debian: apt install pdsh), or choose --launcher {', '.join(LAUNCHERS[1:])}.",
        )


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
