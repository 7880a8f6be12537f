"""What a host says about itself that the launching side compares with the other hosts.

A host prints one line of JSON after `MARK`, for login scripts may print too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipeline import config, hosts, rungs
from pipeline.config import Config
from pipeline.dataset import crop_indexes, open_split
from pipeline.doctor import folders, host
from pipeline.doctor.finding import Finding
from pipeline.rungs import Rung
from pipeline.versions import versions
from shards.errors import UserError

MARK = "onehour-doctor "
WATCHED = re.compile(r"^(NCCL_\w+|GLOO_\w+|TORCH_\w+|OMP_NUM_THREADS|PYTHONDONTWRITEBYTECODE|DS_ACCELERATOR)$")
"""Environment variables that change how ranks meet, compute or start."""


@dataclass(frozen=True)
class Facts:
    """What one host is.

    Attributes:
        name: by its own account.
        findings: that it has about itself.
        versions: of Python and packages.
        code: digest of each source file of ours, by path.
        configuration: every value of the resolved configuration by dotted path, as JSON; without the place of the
            data, whose digests are in `shards`. None without a configuration.
        gpus: numbers of its GPUs; None where they cannot be told.
        environment: the watched variables that are set for a command over ssh.
        interfaces: IPv4 addresses by NIC, of those that are up, loopback left out.
        own_address: what its name resolves to there; None where it does not.
        decoder: the live rung; None where the one that is asked for is not there.
        shards: digests of the index and number of crop indexes, by split.
        place: the nearest folder that exists where the run will write.
        marker: the name of the file that it left there for others to see.
        unwritable: why it could not.
    """

    name: str
    findings: tuple[Finding, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    configuration: dict[str, str] | None = None
    gpus: list[int] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    interfaces: dict[str, list[str]] = field(default_factory=dict)
    own_address: str | None = None
    decoder: Rung | None = None
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    place: str | None = None
    marker: str | None = None
    unwritable: str | None = None

    @classmethod
    def read(cls, answer: Mapping[str, Any]) -> Facts:
        """The facts that a host printed."""
        findings = tuple(Finding(**{**found, "mend": tuple(found["mend"])}) for found in answer["findings"])
        return cls(**{**answer, "findings": findings})


def say(answer: Any) -> None:
    """Print one object for the launching side."""
    print(MARK + json.dumps(answer), flush=True)


def heard(output: str) -> Any:
    """The object in what a host printed; None if there is none."""
    for line in output.splitlines():
        _, mark, text = line.partition(MARK)  # pdsh puts the host's name before it
        if mark:
            with contextlib.suppress(ValueError):
                return json.loads(text)
    return None


def tell(config_path: str | None, overrides: Sequence[str], token: str) -> None:
    """Look at this host and print its facts.

    Args:
        config_path, overrides: the configuration; None for none.
        token: how the name of the file begins that it leaves where the run will write.
    """
    experiment, findings = None, []
    if config_path is not None:
        try:
            experiment = config.load(config_path, overrides)
        except UserError as error:
            findings.append(Finding("configuration", "wrong", error.headline, error.details))
    findings += host.examine(experiment)
    marker = f"{token}-{secrets.token_hex(4)}"
    unwritable = folders.leave_marker(experiment.run_folder, marker) if experiment is not None else None
    gpus = None
    try:
        gpus = hosts.local_gpus()
    except UserError as error:
        findings.append(Finding("slots", "wrong", error.headline, error.details))
    say(
        asdict(
            Facts(
                name=socket.gethostname(),
                findings=tuple(findings),
                versions=versions(),
                code=source_digests(),
                configuration=flat(experiment) if experiment is not None else None,
                gpus=gpus,
                environment={name: value for name, value in os.environ.items() if WATCHED.match(name)},
                interfaces=interfaces(),
                own_address=_own_address(),
                decoder=_decoder(experiment),
                shards=_shards(experiment) if experiment is not None else {},
                place=str(folders.nearest(experiment.run_folder)) if experiment is not None else None,
                marker=marker,
                unwritable=unwritable,
            )
        )
    )


def source_digests() -> dict[str, str]:
    """The digest of every Python source of the packages, by its path in them."""
    root = Path(__file__).resolve().parents[2]
    files = sorted(path for package in ("pipeline", "shards") for path in (root / package).rglob("*.py"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def flat(experiment: Config) -> dict[str, str]:
    """Every value of the resolved configuration by its dotted path, as JSON, without the place of the data."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}" if path else str(key))
        else:
            yield path, json.dumps(value, sort_keys=True)

    values = dict(walk(experiment.resolved(), ""))
    values.pop("recipe.data", None)
    return values


def interfaces() -> dict[str, list[str]]:
    """IPv4 addresses by NIC, of those that are up; loopback is left out."""
    states = psutil.net_if_stats()
    found = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }
    return {
        name: addresses
        for name, addresses in found.items()
        if any(not address.startswith("127.") for address in addresses)
    }


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _decoder(experiment: Config | None) -> Rung | None:
    try:
        return rungs.ladder(experiment.recipe.loader.decoder if experiment is not None else "auto")[0]
    except UserError:
        return None


def _shards(experiment: Config) -> dict[str, dict[str, Any]]:
    found = {}
    for name in dict.fromkeys(("train", experiment.recipe.evaluation.split)):
        try:
            split = open_split(experiment.recipe, name)
            found[name] = {"index": split.digest[:12], "crop indexes": crop_indexes(split)}
        except UserError:
            continue  # is among the findings
    return found
