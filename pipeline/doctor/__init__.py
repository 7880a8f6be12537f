"""`onehour doctor`: what is wrong with this host, or with a cluster, before anybody waits for it.

Every host looks at itself (`host`) and says what must be the same everywhere (`facts`); the launching side asks all of
them over ssh (`cluster`), compares (`compare`), tries the network (`network`, `allreduce`) and draws it (`page`).
"""

from __future__ import annotations

import argparse
import json
import socket
from dataclasses import asdict
from pathlib import Path

from shards.errors import UserError

DEFAULT_PORT = 29500
"""Where ranks meet on the first host unless the launcher is given another `--master_port`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `onehour doctor`."""
    from pipeline.experiment import add_config_arguments

    add_config_arguments(parser, required=False)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    group = parser.add_argument_group("a cluster, looked at over ssh before a run")
    group.add_argument("--hostfile", type=Path, help="one line per host: worker-0 slots=8")
    group.add_argument("--include", default="", help="hosts and slots to look at: worker-0@worker-1:0,2")
    group.add_argument("--exclude", default="", help="hosts and slots not to look at")
    group.add_argument("--master_port", type=int, default=DEFAULT_PORT, help="as for the run (default: %(default)s)")
    group.add_argument("--quick", action="store_true", help="without the all-reduce, for which all ranks are started")
    group.add_argument("--facts", metavar="TOKEN", help=argparse.SUPPRESS)  # what the launching side asks a host for


def run(args: argparse.Namespace) -> int:
    """Look at this host, or at all of a hostfile. Exit code 1 if something is wrong.

    Raises:
        UserError: the configuration itself is mistaken, or the hostfile or a filter.
    """
    from pipeline import config
    from pipeline.doctor import cluster, facts, host, page
    from pipeline.experiment import overrides_of

    if args.facts is not None:
        facts.tell(args.config, overrides_of(args), args.facts)
        return 0
    if args.hostfile is None and (args.include or args.exclude):
        raise UserError("--include and --exclude filter a hostfile; give one with --hostfile")
    experiment = config.load(args.config, overrides_of(args)) if args.config else None
    if args.hostfile is not None:
        return cluster.run(args, experiment)
    findings = list(host.examine(experiment))
    if args.json:
        print(json.dumps({"host": socket.gethostname(), "findings": [asdict(finding) for finding in findings]}))
    else:
        print(page.one_host(socket.gethostname(), findings))
    return 1 if any(finding.verdict == "wrong" for finding in findings) else 0
