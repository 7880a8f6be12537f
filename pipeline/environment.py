"""The environment of ranks on other hosts: what travels there, and the file that DeepSpeed's launcher takes it from.

Over ssh almost nothing of it arrives: no PATH of a virtual environment, no OMP_NUM_THREADS, none of gloo's variables.
The launcher sends what a `.deepspeed_env` names, breaks on a blank line in it, and puts values between double quotes
without minding what a shell finds in them. So a file is written for each launch, out of the user's own and what ranks
need.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from shards.errors import UserError

ENVIRONMENT_LINE = re.compile(r"^\s*([A-Za-z_]\w*)\s*=(.*)$")
TRAVELLING_PREFIXES = ("GLOO_", "NCCL_", "UCX_", "FI_", "OMP_", "MKL_", "CUDA_", "TORCH_", "DS_", "HF_", "ONEHOUR_")
TRAVELLING = ("LD_LIBRARY_PATH", "TZ", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""What ranks may need of the launching host's environment. Not among it: secrets, because every process list of every
host would show them; who wants them to travel names them in `.deepspeed_env`."""

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY$")
SECRET_VALUE = re.compile(r"//[^/]*:[^/]*@")  # a proxy's password

SSH_OPTIONS = "-oBatchMode=yes -oConnectTimeout=10 -oServerAliveInterval=10 -oServerAliveCountMax=3"
"""For pdsh's ssh: it asks nothing, and notices in half a minute that a host is cut off."""

OF_ONE_HOST = frozenset(("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE"))
PLAIN_VALUE = re.compile(r"^[\w@%+=:,./-]*$")
"""What the launcher passes on as it is; it puts quotes around the rest."""


def for_hosts(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that ranks on other hosts are given.

    The user's own files (`.deepspeed_env` in the home and the working folder, or the name in `DS_ENV_FILE`) win over
    the environment. Blank lines and comments are allowed in them.

    Raises:
        UserError: a line of such a file is not of the form NAME=VALUE.
    """
    variables = {
        name: value
        for name, value in environ.items()
        if (name in TRAVELLING or name.startswith(TRAVELLING_PREFIXES))
        and name not in OF_ONE_HOST
        and not (is_secret(name) or SECRET_VALUE.search(value))
    }
    # the environment of the interpreter first: what it calls by name must be what it was installed with
    variables["PATH"] = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), environ.get("PATH"))))
    variables.setdefault("OMP_NUM_THREADS", "1")  # the ranks set their own share of the cores
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in (Path.home() / name, Path(name)):  # where the name is absolute, joining gives it alone
        if path.is_file():
            variables |= _read(path)
    return variables


def is_secret(name: str) -> bool:
    """Whether a variable of this name is one that other users of a host must not see."""
    return SECRET_NAME.search(name) is not None


def file_text(variables: Mapping[str, str], launcher: str) -> str:
    """A `.deepspeed_env` with these variables, each of which arrives on the hosts as it is here.

    Args:
        variables: by name.
        launcher: DeepSpeed's `--launcher`. With pdsh a shell reads the values between double quotes; the others have no
            shell, so that a value which the launcher quotes would keep its quotes: it cannot travel. Slurm's also
            takes the rest of a value after a comma for another variable.

    Raises:
        UserError: a value cannot travel; of the environment's own ones, such are left out.
    """
    lines = []
    for name, value in variables.items():
        travels = "\n" not in value and value == value.strip()
        if launcher != "pdsh":
            travels = travels and bool(PLAIN_VALUE.match(value)) and not (launcher == "slurm" and "," in value)
        if not travels:
            if name == "PATH" or os.environ.get(name) == value:
                continue
            raise UserError(
                f".deepspeed_env: {name}={value!r} cannot be passed on by --launcher {launcher}",
                f"A value may have letters, digits and @%+=:{',' * (launcher != 'slurm')}./- without blanks. "
                "Set the variable on the hosts instead.",
            )
        if launcher == "pdsh":
            value = re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")  # pdsh itself expands %h, %u and %n
        lines.append(f"{name}={value}\n")
    return "".join(lines)


@contextlib.contextmanager
def travelling(variables: Mapping[str, str], launcher: str) -> Iterator[dict[str, str]]:
    """The variables in a file that the launcher reads while the block runs.

    Args:
        variables, launcher: see `file_text`; without variables there is no file.

    Returns:
        What to set for the launcher.
    """
    if not variables:
        yield {}
        return
    with tempfile.NamedTemporaryFile("w", prefix="onehour-", suffix=".deepspeed_env") as file:
        file.write(file_text(variables, launcher))
        file.flush()
        ssh = " ".join(filter(None, (os.environ.get("PDSH_SSH_ARGS_APPEND"), SSH_OPTIONS)))
        yield {"DS_ENV_FILE": file.name, "PDSH_SSH_ARGS_APPEND": ssh}


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    variables = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = ENVIRONMENT_LINE.match(line)
        if match is None:
            raise UserError(
                f"{path}:{number}: {line!r} is not of the form NAME=VALUE", "Its variables are given to every host."
            )
        variables[match[1]] = match[2].strip()
    return variables
