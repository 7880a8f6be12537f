"""All hosts of a hostfile, looked at over ssh at the same time: each looks at itself, and here it is compared."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import environment, hosts, remote
from pipeline.config import Config
from pipeline.doctor import allreduce, compare, folders, network, page
from pipeline.doctor.compare import Check
from pipeline.doctor.facts import MARK, Facts, heard
from pipeline.doctor.finding import Finding
from pipeline.experiment import overrides_of
from shards.errors import UserError

HELLO_SECONDS = 15
LOOK_SECONDS = 120
"""For a host to look at itself; most of it is importing torch from a slow file system."""

ROOT = Path(__file__).resolve().parents[2]

SSH_MENDS = {
    "Permission denied": "ssh-copy-id {host}: a key without a passphrase, or one that ssh-agent holds.",
    "Host key verification failed": "Is it the right machine? Then: ssh-keyscan {host} >> ~/.ssh/known_hosts",
    "Could not resolve": "Is the name right in the hostfile? It must be in DNS, /etc/hosts or ~/.ssh/config.",
    "refused": "Start its ssh server: systemctl start ssh",
}
"""What helps, by what ssh says."""

POINTLESS = ("ssh", "onehour", "launcher", "slots", "environment", "network", "versions", "code")
"""Checks that must be fine before ranks are started."""


class Cluster:
    """The hosts of a launch, and what has been found about them.

    Args:
        slots: the numbers of the slots that are used, by host.
        config: the configuration's path and overrides, as the command line gives them to each host.
        port: where the ranks will meet on the first host.
        run_folder: where the run will write; None without a configuration.
    """

    def __init__(
        self, slots: Mapping[str, Sequence[int]], config: Sequence[str], port: int, run_folder: Path | None
    ) -> None:
        self.slots, self.config, self.port, self.run_folder = slots, config, port, run_folder
        self.names = list(slots)
        self.checks: list[Check] = []
        self.address: str | None = None
        self._token = secrets.token_hex(4)

    def examine(self) -> None:
        """Everything but the all-reduce; `checks` and `address` are the outcome."""
        there = self._hello()
        try:
            facts = self._look(there)
            self.checks += compare.compare(facts, self.slots)
            if facts:
                self._try_network(facts)
        finally:
            self._clean_up(there)

    def blocking(self) -> str | None:
        """Why ranks had better not be started; None if they may be."""
        bad = [check.about for check in self.checks if check.about in POINTLESS and check.verdict == "wrong"]
        return " and ".join(bad) or None

    def _hello(self) -> list[str]:
        """Who answers over ssh, and what time it is there."""
        line = f"echo {shlex.quote(MARK)}$(date +%s.%N)"
        answers = remote.run_everywhere(self.names, line, timeout=HELLO_SECONDS)
        found: dict[str, list[Finding]] = {}
        offsets = {}
        for host, answer in answers.items():
            time = heard(answer.stdout) if answer.code == 0 else None
            if time is None:
                why = answer.problem or "its shell does not do what it is told"
                mend = next((mend for said, mend in SSH_MENDS.items() if said in why), None)
                mend = mend or "Is it up, and port 22 open to this machine? ssh {host} true"
                found[host] = [Finding("ssh", "wrong", why, (mend.format(host=host),))]
                continue
            found[host] = [Finding("ssh", "good", "answers without asking")]
            offsets[host] = (time - answer.began - answer.seconds, time - answer.began)
        self.checks.append(Check("ssh", found))
        if offsets:
            self.checks.append(Check("clock", compare.clocks(offsets)))
        return list(offsets)

    def _look(self, there: Sequence[str]) -> dict[str, Facts]:
        """What each host says of itself; one that cannot is a finding."""
        command = _python("pipeline.cli", "doctor", *self.config, "--facts", self._token)
        answers = remote.run_everywhere(
            there, command, cwd=Path.cwd(), environment=_environment(), timeout=LOOK_SECONDS
        )
        facts, found = {}, {}
        for host, answer in answers.items():
            told = heard(answer.stdout)
            if told is not None and answer.code == 0:
                facts[host] = Facts.read(told)
                found[host] = [Finding("onehour", "good", "runs there")]
            else:
                found[host] = [Finding("onehour", "wrong", answer.problem or "says nothing", (_start_mend(answer),))]
        if found:
            self.checks.append(Check("onehour", found))
        return facts

    def _try_network(self, facts: Mapping[str, Facts]) -> None:
        """Have every host connect to the first one, and look for what the others wrote."""
        first, *others = facts
        tried: dict[str, Any] = {}
        if first != self.names[0]:
            self._add(
                "network", {first: [Finding("network", "wrong", f"{self.names[0]}, the first host, is not there")]}
            )
            self._ask(facts, list(facts), [], "")
            return
        command = _python("pipeline.doctor.network", json.dumps({"listen": self.port}))
        with remote.started(first, command, cwd=Path.cwd(), environment=_environment()) as listener:
            assert listener.stdout is not None
            patience = threading.Timer(HELLO_SECONDS, listener.kill)  # else a host that hangs would be waited for
            patience.start()
            told = None
            for line in listener.stdout:
                told = heard(line)
                if told is not None:
                    break
            patience.cancel()
            told = told or {"error": "does not answer", "holder": None}
            candidates = [address for addresses in facts[first].interfaces.values() for address in addresses]
            tried = self._ask(facts, [first, *others], candidates, told.get("word", ""))
        if "error" in told:
            holder = f" (by {told['holder']})" if told["holder"] else ""
            text = f"port {self.port} of {first} cannot be used: {told['error'].lower()}{holder}"
            mend = "End what uses it there, or give doctor and train another: --master_port 29501"
            self._add("network", {first: [Finding("network", "wrong", text, (mend,))]})
            return
        meeting = network.meeting(facts, {host: tried[host] for host in others}, self.port)
        self.address = meeting.address
        self._add("network", meeting.found)

    def _ask(
        self, facts: Mapping[str, Facts], names: Sequence[str], addresses: Sequence[str], word: str
    ) -> dict[str, dict[str, Any]]:
        """Have hosts try addresses and look for marks. Returns what came of the addresses, by host."""
        marks = {host: facts[host].marker for host in names if facts[host].marker is not None}
        request = {
            "port": self.port,
            "addresses": list(addresses),
            "word": word,
            "folder": str(self.run_folder) if self.run_folder is not None else None,
            "markers": list(marks.values()),
        }
        command = _python("pipeline.doctor.network", json.dumps(request))
        answers = remote.run_everywhere(
            names, command, cwd=Path.cwd(), environment=_environment(), timeout=HELLO_SECONDS + network.REACH_SECONDS
        )
        told = {host: heard(answer.stdout) or {"tried": {}, "seen": None} for host, answer in answers.items()}
        if self.run_folder is not None:
            seen = {
                host: [other for other, mark in marks.items() if mark in answer["seen"]]
                for host, answer in told.items()
                if answer["seen"] is not None
            }
            self._add("run folder", compare.shared_folder(seen, facts))
        return {host: answer["tried"] for host, answer in told.items()}

    def _add(self, about: str, found: Mapping[str, Sequence[Finding]]) -> None:
        """Add findings to the check of that name, or a new check."""
        for number, check in enumerate(self.checks):
            if check.about == about:
                both = {host: [*check.found.get(host, ()), *found.get(host, ())] for host in {**check.found, **found}}
                self.checks[number] = Check(about, both)
                return
        self.checks.append(Check(about, found))

    def _clean_up(self, there: Sequence[str]) -> None:
        if self.run_folder is not None and there:
            # the nearest folder that exists, as each host found it: any of those above the run's may be that
            folder = self.run_folder.absolute()
            places = [shlex.quote(str(place)) for place in (folder, *folder.parents)]
            files = " ".join(f"{place.rstrip('/')}/{folders.MARKER}{self._token}-*" for place in places)
            remote.run_everywhere(there, f"rm -f {files}", timeout=HELLO_SECONDS)


def run(args: argparse.Namespace, experiment: Config | None) -> int:
    """Look at a hostfile's hosts and print it. Exit code 1 if something is wrong.

    Raises:
        UserError: the hostfile or a filter cannot be used.
    """
    slots = hosts.select(hosts.read_hostfile(args.hostfile), args.include, args.exclude)
    given = [f"--set={override}" for override in overrides_of(args)]
    config = [str(experiment.path), *given] if experiment is not None else []
    cluster = Cluster(slots, config, args.master_port, experiment.run_folder if experiment is not None else None)
    summary = []
    try:
        hosts.check_remote("pdsh", experiment.path if experiment is not None else Path("config.json"))
    except UserError as error:
        summary.append(Finding("launcher", "wrong", error.headline, error.details))
    cluster.examine()
    result: dict[str, Any] = {}
    ranks = sum(map(len, slots.values()))
    blocking = "launcher" if summary else cluster.blocking()
    if blocking is not None:
        result = {"skipped": f"not tried: {blocking} first"}
    elif ranks == 1 or args.quick:
        result = {"skipped": "left out, as --quick says" if args.quick else "there is one rank only"}
    else:
        with environment.travelling(environment.for_hosts(os.environ), "pdsh") as variables:
            result = allreduce.measure(_launcher_options(args, cluster), variables)
    summary.append(_all_reduce(result))
    if args.json:
        checks = [
            {"about": c.about, "hosts": {host: [asdict(one) for one in found] for host, found in c.found.items()}}
            for c in cluster.checks
        ]
        number = page.count_problems(cluster.checks, summary)
        answer = {"hosts": cluster.names, "checks": checks, "all_reduce": result, "problems": number}
        print(json.dumps({**answer, "summary": [asdict(finding) for finding in summary]}))
    else:
        print(page.cluster(cluster.names, cluster.checks, summary))
    return 1 if page.count_problems(cluster.checks, summary) else 0


def _launcher_options(args: argparse.Namespace, cluster: Cluster) -> list[str]:
    options = ["--hostfile", str(args.hostfile), "--master_port", str(args.master_port)]
    options += [
        word for name in ("include", "exclude") if (text := getattr(args, name)) for word in (f"--{name}", text)
    ]
    if cluster.address is not None:
        options += ["--master_addr", cluster.address]
    if len(cluster.names) == 1:
        options.append("--force_multi")  # as in a training: else ranks are started here
    return options


def _environment() -> dict[str, str]:
    """What a launch gives to every host, and what its launcher itself sends."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # the launch takes it out
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**variables, **environment.for_hosts(os.environ)}


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]


def _start_mend(answer: remote.Answer) -> str:
    said = answer.stderr
    if answer.code is None:
        return f"Is a file system hanging there? ssh {answer.host} ls {Path.cwd()}"
    if "cd:" in said:
        return f"The working folder must be on every host, at the same path: {Path.cwd()}"
    if "ModuleNotFoundError" in said or "No module named" in said:
        return "The same code and packages on every host, at the same paths, e.g. on a shared file system."
    if "not found" in said or "No such file" in said:
        return f"The same Python on every host, at the same path: {sys.executable}"
    return f"Try it there: {shlex.join(_python('pipeline.cli', 'doctor'))}"


def _all_reduce(result: Mapping[str, Any]) -> Finding:
    about = "all-reduce"
    if "skipped" in result:
        return Finding(about, "slow", result["skipped"])
    if "error" in result:
        mend = "Ranks connect at ports of their own choice: open all above 1023 between the hosts."
        return Finding(about, "wrong", result["error"], (mend,))
    text = f"{result['bus'] / 1e9:.2g} GB/s between {result['ranks']} ranks ({result['bytes'] / 1e6:.0f} MB of fp32)"
    if result["pairs"]:
        rate, one, other = result["pairs"][0]
        text += f", slowest pair {one} ↔ {other}: {rate / 1e9:.2g} GB/s"
    return Finding(about, "good", text)
