"""Several machines in one: network namespaces with names and addresses of their own, joined by a bridge.

All of it lives in one sandbox with its own process ids, mounts and network, which has no way out. When the sandbox's
first process ends, or the one that made it, the kernel ends everything in it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

NETWORK = "10.77.0"
SLOW_LINK = Path(__file__).with_name("slow_link.py")
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "hostname", "mount")

_FIRST_PROCESS = f"""
set -e
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs tmpfs /run/netns
ip link set lo up
ip link add bridge type bridge
ip address add {NETWORK}.254/24 dev bridge
ip link set bridge up
shift
number=0
for name in "$@"; do
    number=$((number + 1))
    ip netns add "$name"
    ip link add "to-$name" type veth peer name eth0 netns "$name"
    ip link set "to-$name" master bridge up
    ip -n "$name" address add {NETWORK}.$number/24 dev eth0
    ip -n "$name" link set eth0 up
    ip -n "$name" link set lo up
done
hostname controller
echo ready
exec sleep 3600
"""
"""Arguments: a folder with a file `hosts`, and the machines' names."""
_RANKS = (["-m", "ee_tuning", "tune"], ["-u", "-m", "ee_tuning"])
"""What stands behind `python` where srun or torchrun started it."""


def missing_for_machines() -> str | None:
    """Why this machine can not be several, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if gone := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"there is no {' and no '.join(gone)}; on Debian: apt-get install iproute2 util-linux"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"namespaces are refused here: {tried.stderr.strip()}"


class Machines:
    """Machines with these names, each with an address and a host name that all know. Use it as a context."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.names, self.folder = tuple(names), folder
        self.addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=1)}
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Machines":
        lines = ["127.0.0.1 localhost", f"{NETWORK}.254 controller"]
        lines += [f"{address} {name}" for name, address in self.addresses.items()]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        Path("/run/netns").mkdir(exist_ok=True)  # a place to mount upon
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork"]
        command += ["--kill-child=KILL", "--mount-proc", "bash", "-c", _FIRST_PROCESS, "machines", str(self.folder)]
        self._sandbox = subprocess.Popen([*command, *self.names], stdout=subprocess.PIPE, text=True)
        assert self._sandbox.stdout is not None
        if self._sandbox.stdout.readline() != "ready\n":
            self.__exit__()
            raise RuntimeError("the machines can not be made; see what ip says above")
        children = Path(f"/proc/{self._sandbox.pid}/task/{self._sandbox.pid}/children")
        self._first = int(children.read_text().split()[0])
        return self

    def __exit__(self, *_: object) -> None:
        self._sandbox.kill()
        self._sandbox.wait()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)

    def words(self, command: Sequence[str], machine: str | None = None) -> list[str]:
        """The command as it is called from outside: on the `machine`, or on the one that all hang on."""
        inside = ["nsenter", "--target", str(self._first), "--mount", "--net", "--uts", "--ipc", "--pid"]
        inside += [f"--wd={os.getcwd()}"]
        if machine is not None:
            name = ["unshare", "--uts", "sh", "-c", f'hostname {machine}; exec "$@"', machine]
            inside += ["nsenter", f"--net=/run/netns/{machine}", *name]
        return [*inside, *command]

    def run(
        self,
        command: Sequence[str],
        machine: str | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Runs it to its end, in `folder`."""
        inside = ["env", f"--chdir={folder or Path.cwd()}", *command]
        return subprocess.run(
            self.words(inside, machine),
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(
        self,
        command: Sequence[str],
        log: Path,
        machine: str | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Starts it; what it says goes to `log`."""
        inside = ["env", f"--chdir={folder or Path.cwd()}", *command]
        with log.open("a", encoding="utf-8") as stream:
            process = subprocess.Popen(
                self.words(inside, machine),
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                text=True,
            )
        self._processes.append(process)
        return process

    def ranks(self, machine: str) -> list[int]:
        """The machine's processes that are ranks of a command, by the ids that they have in the sandbox."""
        found = map(int, self.run(["ip", "netns", "pids", machine]).stdout.split())
        lines = {pid: self.run(["cat", f"/proc/{pid}/cmdline"]).stdout.split("\0") for pid in found}
        return [pid for pid, line in lines.items() if "python" in line[0] and line[1:4] in _RANKS]

    def signal(self, name: str, processes: Sequence[int]) -> None:
        """Sends them the signal."""
        self.run(["kill", f"-{name}", *map(str, processes)])

    def crash(self, machine: str) -> None:
        """Ends all that runs on the machine at once."""
        self.run(["sh", "-c", f"kill -KILL $(ip netns pids {machine})"])

    def set_link(self, machine: str, is_up: bool) -> None:
        """Plugs the machine's cable in, or pulls it."""
        done = self.run(["ip", "link", "set", f"to-{machine}", "up" if is_up else "down"])
        assert done.returncode == 0, done.stderr

    @contextlib.contextmanager
    def slow_link(self, machine: str, seconds: float) -> Iterator[None]:
        """Holds every frame between the machine and all others for `seconds`, in each direction."""
        command = [sys.executable, str(SLOW_LINK), f"slow-{machine}", f"near-{machine}", str(seconds)]
        process = subprocess.Popen(self.words(command), stdout=subprocess.PIPE, text=True)
        self._processes.append(process)
        assert process.stdout is not None
        said, _, number = process.stdout.readline().partition(" ")
        if said != "ready":
            raise RuntimeError("no frames can be held here; see what slow_link.py says above")
        address = f"{self.addresses[machine]}/24"
        self._ip("link", "set", f"near-{machine}", "master", "bridge", "up")
        self._ip("-n", machine, "link", "set", "eth0", "down", "name", "fast0")
        self._ip("-n", machine, "address", "del", address, "dev", "fast0")
        self._ip("link", "set", f"slow-{machine}", "netns", machine, "name", "eth0")
        try:
            self._plug_in(machine, "eth0")
            yield
        finally:
            self.signal("KILL", [int(number)])  # its devices go with it
            process.wait(10)
            wait_until("the slow cable is gone", lambda: self._has_no_cable(machine), 10)
            self._ip("-n", machine, "link", "set", "fast0", "name", "eth0")
            self._plug_in(machine, "eth0")

    def _plug_in(self, machine: str, device: str) -> None:
        self._ip("-n", machine, "address", "add", f"{self.addresses[machine]}/24", "dev", device)
        self._ip("-n", machine, "link", "set", device, "up")
        for name in self.names:  # who remembers the other device
            self._ip("-n", name, "neighbour", "flush", "all")
        self._ip("neighbour", "flush", "all")

    def _has_no_cable(self, machine: str) -> bool:
        return self.run(["ip", "-n", machine, "link", "show", "eth0"]).returncode != 0

    def _ip(self, *words: str) -> None:
        done = self.run(["ip", *words])
        assert done.returncode == 0, (words, done.stderr)


def wait_until(claim: str, is_so: Callable[[], bool], seconds: float, pause: float = 0.2) -> None:
    """Raises AssertionError where `is_so()` is not true within `seconds`."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {claim}"
        time.sleep(pause)
