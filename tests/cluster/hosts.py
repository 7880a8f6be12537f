"""Hosts of a cluster on one machine: each has its own processes, network, mounts, host name, and a real sshd.

    with Cluster(2) as cluster:
        first, second = cluster.hosts
        first.run(["ssh", "node-1", "hostname"]).stdout  # "node-1\\n"
        hostfile = cluster.hostfile(folder / "hosts", slots=2)
        first.run([python, "-m", "pipeline.cli", "train", config, "--hostfile", hostfile], cwd=folder)

The files are the machine's, as on hosts that share a file system at the same paths, except for /run, /dev/shm,
/etc/ssh, /etc/hosts, and what a test binds over. All of it exists in Linux namespaces that nothing but a process holds:
when the process that made a cluster ends, even by SIGKILL, the kernel removes every host and whatever runs on it. So
there is nothing to sweep, any number of clusters may exist at once, and none of them is seen outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

NETWORK = "10.77.0"  # the same in every cluster: they do not see each other
SSHD = "/usr/sbin/sshd"  # it starts itself again for each connection, and wants the whole path for that
TOOLS = {"ip": "iproute2", "pdsh": "pdsh", "ssh": "openssh-client", SSHD: "openssh-server", "nsenter": "util-linux"}
UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--net", "--uts", "--ipc"]
SECONDS = 20  # for what takes milliseconds
LIBC = ctypes.CDLL(None, use_errno=True)

# What a person has who logs in as root; of the environment of the tests nothing is on another host
LOGIN = {
    "HOME": pwd.getpwuid(0).pw_dir,
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/sh",
    "USER": "root",
}
# Process 1 of a host does nothing. That it ignores SIGCHLD makes the kernel reap whatever is orphaned there
HOLD = "echo ready; exec env --ignore-signal=CHLD cat >/dev/null 2>&1"
SET_UP_HOST = """
hostname "$1"
ip link set lo up
mount -t sysfs sysfs /sys  # else it would list the network devices of the machine
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd /run/empty
cp -r "$2" /run/cluster
mount --bind /run/cluster/hosts /etc/hosts
mount --bind /run/cluster/ssh /etc/ssh
# what this machine's root has set for himself: Debian's bash reads .bashrc for remote commands, too
[ ! -d ~/.ssh ] || mount --bind /run/empty ~/.ssh
for name in .bashrc .deepspeed_env; do [ ! -e ~/$name ] || mount --bind /dev/null ~/$name; done
"""
SSH_CONFIG = """
Host *
    IdentityFile /etc/ssh/identity
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/identity.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""


def missing() -> str | None:
    """Why there can be no cluster on this machine; None where there can."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: apt install {package})"
    script = "ip link add bridge type bridge && ip link add one type veth peer name two"
    tried = subprocess.run([*UNSHARE, "sh", "-c", script], capture_output=True, text=True, timeout=SECONDS)
    return f"no namespaces with a bridge here: {tried.stderr.strip()}" if tried.returncode else None


class Namespaces:
    """Namespaces of all kinds but users', and the idle process that holds them.

    Attributes:
        pid: of a process in all of them but the PID namespace, whose process 1 is its only child.
    """

    def __init__(self, set_up: str = "", *arguments: str) -> None:
        command = [*UNSHARE, "sh", "-ec", f"{set_up}\n{HOLD}", "sh", *arguments]
        # the holder reads from a pipe that nothing is written to, and ends with the process that could
        self._holder = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # out of the reach of the terminal's Ctrl-C
        )
        self.pid = self._holder.pid
        assert self._holder.stdout is not None
        said = ""
        while not said.endswith("ready\n"):
            line = self._holder.stdout.readline()
            if not line:
                self._holder.wait(SECONDS)
                raise RuntimeError(f"namespaces cannot be set up here:\n{said}")
            said += line
        [self._init] = psutil.Process(self.pid).children()
        self._processes_of = Path(f"/proc/{self.pid}/ns/pid_for_children")

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8) in this network."""
        command = ["nsenter", f"--target={self.pid}", "--net", "ip", "-batch", "-"]
        subprocess.run(command, input="\n".join(commands), text=True, check=True, timeout=SECONDS)

    @contextlib.contextmanager
    def adopting(self) -> Iterator[None]:
        """Children that this thread starts meanwhile are in this PID namespace."""
        with self._processes_of.open() as there, Path("/proc/self/ns/pid").open() as here:
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(here.fileno())

    def processes(self) -> list[psutil.Process]:
        """Those that live in this PID namespace, without its process 1."""
        namespace = self._processes_of.readlink()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                inside = Path(f"/proc/{process.pid}/ns/pid").readlink() == namespace
                if inside and process != self._init and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self, children: Sequence[subprocess.Popen] = ()) -> None:
        """Remove them and kill every process in them; `children` are this process's own among those."""
        self._init.kill()
        for child in children:  # process 1 is not gone before the last zombie is
            child.wait(SECONDS)
        self._holder.communicate(timeout=SECONDS)


def _set_namespace(descriptor: int) -> None:
    if LIBC.setns(descriptor, 0) != 0:  # os.setns is there from Python 3.12 on
        raise OSError(ctypes.get_errno(), "setns")


class Host:
    """One host. `Cluster` makes it.

    Attributes:
        name: its host name, which every host of the cluster resolves.
        address: its IPv4 address.
        nic: the name of its network device.
        environment: variables of every session on it; `boot` gives them to its sshd.
    """

    def __init__(
        self, name: str, address: str, nic: str, environment: Mapping[str, str], files: Path, switch: Namespaces
    ) -> None:
        self.name, self.address, self.nic, self.environment = name, address, nic, dict(environment)
        self._switch = switch
        self._namespaces = Namespaces(SET_UP_HOST, name, str(files))
        self._started: list[subprocess.Popen] = []
        try:
            switch.ip(
                f"link add {name} type veth peer name {nic} netns {self._namespaces.pid}",
                f"link set {name} master bridge up",
            )
            self._namespaces.ip(f"address add {address}/24 dev {nic}", f"link set {nic} up")
            self.boot()
        except BaseException:
            self.end()
            raise

    def start(
        self, argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: str | Path = "/", **options: Any
    ) -> subprocess.Popen:
        """Start a command as root would who is logged in here, in a session of its own.

        Args:
            argv: the command, looked up on the host's own PATH.
            env: variables beside those of a login and of the host; none of the caller's are passed on.
            cwd: the folder that it starts in.
            options: further ones of `subprocess.Popen`.

        Returns:
            The command's own process: its pid as seen from outside, its exit code, its signals.
        """
        names = ["nsenter", f"--target={self._namespaces.pid}", "--mount", "--net", "--uts", "--ipc"]
        variables = {**LOGIN, **self.environment, **(env or {})}
        with self._namespaces.adopting():
            process = subprocess.Popen(
                [*names, "env", f"--chdir={cwd}", *map(str, argv)], env=variables, start_new_session=True, **options
            )
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = "/",
        timeout: float = 120,
        check: bool = False,
    ) -> subprocess.CompletedProcess:
        """`start` a command and wait for it; its output is captured as text.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds; the command's session is killed.
            subprocess.CalledProcessError: `check` was asked for, and the exit code is not 0.
        """
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.start(argv, env=env, cwd=cwd, text=True, **streams)
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=SECONDS)
            raise
        done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, done.args, f"{output}\n{errors}")
        return done

    def bind(self, source: str | Path, target: str | Path) -> None:
        """Show `source` at the path of `target`, which exists and is of the same kind, on this host only."""
        self.run(["mount", "--bind", source, target], check=True)

    def unbind(self, target: str | Path) -> None:
        """Undo the latest `bind` over `target`."""
        self.run(["umount", target], check=True)

    def pids(self) -> list[int]:
        """Living processes on the host, numbered as outside; its sshd is among them."""
        return [process.pid for process in self._namespaces.processes()]

    def ranks(self) -> dict[int, int]:
        """Processes of the ranks that live on the host: pids as outside, by rank."""
        found = {}
        for process in self._namespaces.processes():
            with contextlib.suppress(psutil.Error):
                if "RANK" in (variables := process.environ()):
                    found[process.pid] = int(variables["RANK"]), process.ppid()
        return {rank: pid for pid, (rank, parent) in found.items() if parent not in found}  # not a rank's own children

    def disconnect(self) -> None:
        """Pull the network cable: nothing arrives any more, nobody is told."""
        self._switch.ip(f"link set {self.name} down")

    def connect(self) -> None:
        """Plug it in again."""
        self._switch.ip(f"link set {self.name} up")

    def reaches(self, other: Host, seconds: int = 2) -> bool:
        """Whether a command can be run on another host from here."""
        command = ["ssh", "-o", f"ConnectTimeout={seconds}", other.name, "true"]
        return self.run(command).returncode == 0

    def kill_all(self) -> None:
        """SIGKILL to every process on the host at once, as an abrupt reboot.

        The kernel closes their connections, so that peers hear of it at once. Where they must not, `disconnect` before.
        """
        self.run(["sh", "-c", "kill -s KILL -- -1"])  # an error where nothing is left to kill
        deadline = time.monotonic() + SECONDS
        while pids := self.pids():
            assert time.monotonic() < deadline, f"{self.name}: {pids} live on"
            time.sleep(0.005)

    def boot(self) -> None:
        """Start sshd, after `kill_all`."""
        set_environment = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        options = ["-o", f"SetEnv={set_environment}"] if self.environment else []
        self.run([SSHD, *options], check=True)
        deadline = time.monotonic() + SECONDS
        # as the kernel writes a socket that listens on port 22
        while not any(
            fields[1].endswith(":0016") and fields[3] == "0A"
            for fields in map(str.split, Path(f"/proc/{self._namespaces.pid}/net/tcp").read_text().splitlines())
        ):
            assert time.monotonic() < deadline, f"{self.name}: no sshd"
            time.sleep(0.005)

    def end(self) -> None:
        """Remove the host and kill every process on it."""
        self._namespaces.end(self._started)


class Cluster:
    """Hosts node-0, node-1, … on one switch, at 10.77.0.1, 10.77.0.2, …; a context manager that ends them.

    Args:
        size: the number of hosts.
        nics: the names of their network devices; eth0 everywhere by default.
        environments: variables of every session on each of them; none by default.
    """

    def __init__(self, size: int, *, nics: Sequence[str] = (), environments: Sequence[Mapping[str, str]] = ()) -> None:
        nics, environments = nics or ["eth0"] * size, environments or [{}] * size
        self.hosts: list[Host] = []
        self._ending = contextlib.ExitStack()
        with contextlib.ExitStack() as ending, tempfile.TemporaryDirectory(prefix="cluster-") as folder:
            files = Path(folder)  # only until every host has its copy
            names = {f"node-{number}": f"{NETWORK}.{number + 1}" for number in range(size)}
            _write_files(files, names)
            switch = Namespaces()
            ending.callback(switch.end)
            switch.ip("link add bridge type bridge", "link set bridge up")
            for (name, address), nic, environment in zip(names.items(), nics, environments, strict=True):
                host = Host(name, address, nic, environment, files, switch)
                ending.callback(host.end)
                self.hosts.append(host)
            self._ending = ending.pop_all()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.close()

    def hostfile(self, path: Path, slots: int = 2, hosts: Sequence[Host] | None = None) -> Path:
        """Write a hostfile of all or some hosts, with as many slots each, and return its path."""
        chosen = self.hosts if hosts is None else hosts
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in chosen))
        return path


def _write_files(folder: Path, addresses: Mapping[str, str]) -> None:
    """What every host of a cluster has: the names of all, and keys that open each of them to the others."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    ssh = folder / "ssh"
    ssh.mkdir()
    (ssh / "ssh_config").write_text(SSH_CONFIG)
    (ssh / "sshd_config").write_text(SSHD_CONFIG)
    for name in ("identity", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(ssh / name)]
        subprocess.run(command, check=True, timeout=SECONDS)
