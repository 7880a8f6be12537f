"""Whether every host reaches the first one, tried from the hosts themselves.

`listen` and `connect` run on the hosts (`python -m pipeline.doctor.network`); `meeting`, on the launching side, is the
pure function that reads what came of it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.doctor import folders
from pipeline.doctor.facts import Facts, say
from pipeline.doctor.finding import Finding

REACH_SECONDS = 4
"""After which a connection that nobody answers is given up: two of TCP's own attempts."""


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet.

    Attributes:
        address: of the first host, that all hosts reach; None where there is none.
        found: the findings by host.
    """

    address: str | None
    found: dict[str, list[Finding]]


def meeting(facts: Mapping[str, Facts], tried: Mapping[str, Mapping[str, Any]], port: int) -> Meeting:
    """Choose the first host's address that every host reaches.

    Args:
        facts: by host; the first one listened.
        tried: what came of connecting, by host (all but the first) and address: {"from": address} or {"error": text}.
        port: that was tried.
    """
    first = next(iter(facts))
    candidates = [address for addresses in facts[first].interfaces.values() for address in addresses]
    reached = {host: [address for address in candidates if "from" in tried[host].get(address, {})] for host in tried}
    common = [address for address in candidates if all(address in reached[host] for host in reached)]
    address = common[0] if common else None
    # where there is none in common: who misses what most reach
    target = address or max(candidates, key=lambda one: sum(one in reached[host] for host in reached), default=None)
    found: dict[str, list[Finding]] = {}
    if target is None:
        mend = "ip address show there: a network card must be up and have an address."
        return Meeting(None, {first: [Finding("network", "wrong", "has no address but loopback's", (mend,))]})
    card = _card(facts[first].interfaces, target)
    found[first] = [Finding("network", "good", f"{target} on {card}")]
    for host in tried:
        answer = tried[host].get(target, {"error": "was not tried"})
        if "from" in answer:
            own = _card(facts[host].interfaces, answer["from"])
            found[host] = [Finding("network", "good", f"reaches {first} at {target} over {own}")]
            continue
        ways = ", ".join(f"{one}: {tried[host].get(one, {}).get('error', 'was not tried')}" for one in candidates)
        mends = (
            f"Open TCP port {port} on {first}, and all ports above 1023 between the hosts (firewall, security group).",
        )
        if any(one in reached[host] for one in candidates):
            mends = (f"Put the hosts on one network: others reach {first} at {target}, this one does not.",)
        found[host] = [Finding("network", "wrong", f"does not reach port {port} of {first} ({ways})", mends)]
    return Meeting(address, found)


def _card(cards: Mapping[str, Sequence[str]], address: str) -> str:
    return next((name for name, addresses in cards.items() if address in addresses), address)


def listen(port: int) -> None:
    """Take connections on a port of all addresses, and answer each with a word, until the input ends."""
    word = secrets.token_hex(8)
    try:
        listener = socket.create_server(("", port), backlog=512)
    except OSError as error:
        say({"error": error.strerror, "holder": _holder(port)})
        return
    with listener, ThreadPoolExecutor(1) as pool:
        pool.submit(_answer, listener, word.encode())
        say({"word": word})
        sys.stdin.read()
        listener.shutdown(socket.SHUT_RDWR)


def _answer(listener: socket.socket, word: bytes) -> None:
    with contextlib.suppress(OSError):  # it was shut down
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(word)


def _holder(port: int) -> str | None:
    """The process that listens on a port, where this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()}, process {connection.pid}"
    return None


def connect(port: int, addresses: Sequence[str], word: str) -> dict[str, dict[str, str]]:
    """Try each address: {"from": the own address of the connection}, or {"error": why not}."""

    def one(address: str) -> dict[str, str]:
        try:
            with socket.create_connection((address, port), REACH_SECONDS) as connection:
                heard = connection.recv(64).decode(errors="replace")
                if heard != word:
                    return {"error": "another program answers"}  # e.g. this host's own network of that number
                return {"from": connection.getsockname()[0]}
        except OSError as error:
            return {"error": str(error.strerror or error).lower()}

    with ThreadPoolExecutor(max(len(addresses), 1)) as pool:
        return dict(zip(addresses, pool.map(one, addresses), strict=True))


def main(request: str) -> None:
    """What the launching side asks a host for, as JSON: {"listen": port}, or a port to connect to and marks to see."""
    asked = json.loads(request)
    if "listen" in asked:
        listen(asked["listen"])
        return
    say(
        {
            "tried": connect(asked["port"], asked["addresses"], asked["word"]) if asked["word"] else {},
            "seen": folders.seen_markers(Path(asked["folder"]), asked["markers"]) if asked["folder"] else [],
        }
    )


if __name__ == "__main__":
    main(sys.argv[1])
