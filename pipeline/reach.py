"""Before ranks are started on other hosts: does each answer, and where can all of them meet?

The launcher asks the first host alone, takes the first of its addresses, which may be on a network that the others are
not on, and a port that may be taken; whatever is wrong shows minutes later, as silence.
"""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline import remote
from shards.errors import UserError

MEETING_PORT = 29500
"""The launcher's own default."""

BRIDGES = ("docker", "br-", "virbr", "veth", "cni")
"""How interfaces begin that lead to containers and virtual machines of a host, and have the same address on each."""

ANSWER_SECONDS = 60.0
MARK = "onehour-reach "
"""Before a host's answer: its login scripts may print as well."""


@dataclass(frozen=True)
class MeetingPlace:
    """Where the ranks meet.

    Attributes:
        address: of the first host.
        port: of it, free at the moment.
    """

    address: str
    port: int


def answering(hosts: Sequence[str], port: int | None = None) -> tuple[list[str], dict[str, str]]:
    """Which hosts a program can be started on: those, and for each of the others the reason why not.

    Args:
        hosts: names that ssh knows.
        port: of their sshd; default: ssh's own.
    """
    answers = _ask(hosts, hosts[0], MEETING_PORT, port)
    silent = {host: reason for host, reason in answers.items() if isinstance(reason, str)}
    return [host for host in hosts if host not in silent], silent


def meeting_place(hosts: Sequence[str], ssh_port: int | None, given: Mapping[str, str]) -> MeetingPlace:
    """An address of the first host that the others know it by, and a free port of it.

    Args:
        hosts: names that ssh knows; rank 0 will be on the first.
        ssh_port: of their sshd; default: ssh's own.
        given: the user's launcher options; `--master_addr` and `--master_port` are taken as they are.

    Raises:
        UserError: a host does not answer, or cannot run the same Python in the same folder; it names all such.
    """
    first = hosts[0]
    port = int(given.get("--master_port", MEETING_PORT))
    answers = _ask(hosts, first, port, ssh_port)
    silent = {host: answer for host, answer in answers.items() if isinstance(answer, str)}
    if silent:
        raise UserError(
            f"{len(silent)} of {len(hosts)} hosts cannot start a rank: {', '.join(silent)}",
            *(f"{host}: {reason}" for host, reason in silent.items()),
            f"Each must let {Path.cwd()} and {sys.executable} be used over ssh without asking for a password.",
            "What else may be wrong: onehour doctor CONFIG --hostfile F",
        )
    facts: dict[str, dict] = {host: answer for host, answer in answers.items() if not isinstance(answer, str)}
    if "--master_port" not in given:
        port = facts[first]["port"]
    if "--master_addr" in given:
        return MeetingPlace(given["--master_addr"], port)
    own = facts[first]["addresses"]
    if len(hosts) == 1 or not own:
        return MeetingPlace("127.0.0.1", port)
    # by whichever address most of the others know it; not its own view, which on Debian is 127.0.1.1
    known = Counter(address for host in hosts[1:] for address in facts[host]["named"] if address in own)
    return MeetingPlace(known.most_common(1)[0][0] if known else own[0], port)


def _ask(hosts: Sequence[str], first: str, port: int, ssh_port: int | None) -> dict[str, dict | str]:
    """Each host's answer to `PROBE`, or the reason why there is none."""
    command = [sys.executable, "-P", "-m", "pipeline.reach", first, str(port)]
    # where the ranks will find the program, too
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    answers: dict[str, dict | str] = {}
    for host, answer in remote.run_everywhere(
        hosts, command, cwd=Path.cwd(), environment=environment, timeout=ANSWER_SECONDS, port=ssh_port
    ).items():
        marked = [line for line in answer.stdout.splitlines() if line.startswith(MARK)]
        if answer.problem is None and marked:
            answers[host] = json.loads(marked[-1].removeprefix(MARK))
        else:
            answers[host] = answer.problem or "its answer is not that of this program"
    return answers


def _answer(first: str, port: int) -> dict:
    """What a host says of itself.

    Returns:
        Its IPv4 addresses, those that it takes the first host's name for, and the port, or a free one if it is taken.
    """
    own = [
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not name.startswith(BRIDGES)
    ]
    try:
        named = {entry[4][0] for entry in socket.getaddrinfo(first, None, socket.AF_INET)}
    except OSError:
        named = set()
    return {
        "addresses": [address for address in own if not address.startswith("127.")],
        "named": sorted(map(str, named)),
        "port": _free(port) or _free(0),
    }


def _free(port: int) -> int | None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return None
        return listener.getsockname()[1]


if __name__ == "__main__":
    print(MARK + json.dumps(_answer(sys.argv[1], int(sys.argv[2]))))
