"""How many ranks a launch will have: the hostfile, its filters, and the accelerators of this machine.

DeepSpeed's launcher trains locally when the hostfile does not exist, and finds most other mistakes only after it has
begun; the same file is read here first, by the launcher's own rules (deepspeed/launcher/runner.py).
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from shards.errors import UserError

HOST_LINE = re.compile(r"^(\S+)\s+slots=(\d+)\s*(?:#.*)?$")


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


def local_accelerators() -> int:
    """CUDA devices that a process on this machine may use, without importing torch; 0 where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
