"""A Slurm of two nodes: munged, slurmctld and two slurmd on the machines of machines.py."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from machines import Machines, missing_for_machines, wait_until

NODES = ("node1", "node2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "mungekey")

_CONFIGURATION = """
ClusterName=test
SlurmctldHost=controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MessageTimeout=10
InactiveLimit=0
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=2
NodeName=node[1-2] CPUs=4 Gres=gpu:2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
SlurmdParameters=config_overrides
"""


def missing_for_slurm() -> str | None:
    """Why there can be no Slurm here, or None."""
    if gone := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"there is no {' and no '.join(gone)}; on Debian: apt-get install slurmctld slurmd slurm-client munge"
    return missing_for_machines()


class Slurm:
    """The running cluster. Use it as a context."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.machines = folder, Machines(folder, NODES)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._nodes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> "Slurm":
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(folder=self.folder), encoding="utf-8")
        for number in range(2):  # in place of /dev/nvidia0 and 1; Slurm sets CUDA_VISIBLE_DEVICES by them
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        self.machines.__enter__()
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.machines.__exit__()

    def _start_daemons(self) -> None:
        munge, log = self.folder / "munge", self.folder / "daemons.log"
        subprocess.run(["mungekey", "--create", f"--keyfile={munge / 'key'}"], check=True)
        paths = [f"--{name}={munge / place}" for name, place in _MUNGE_FILES.items()]
        self.machines.start(["munged", "--foreground", "--force", *paths], log)
        wait_until("munged has a socket", (munge / "socket").exists, 20)
        self.machines.start(["slurmctld", "-D", "-i"], log, environment=self.environment)
        for node in NODES:
            self.start_node(node)
        wait_until("both nodes are idle", lambda: self.node_states() == {"idle"}, 60)

    def start_node(self, node: str) -> None:
        """Starts the node's slurmd."""
        self._nodes[node] = self.machines.start(
            ["slurmd", "-D", "-N", node], self.folder / "daemons.log", node, self.environment
        )

    def node_states(self) -> set[str]:
        """The states of all nodes."""
        return set(self.ask("sinfo", "--noheader", "--Node", "--format=%T").split())

    def ask(self, *command: str, folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """What a command of Slurm answers. Raises AssertionError where it fails."""
        done = self.machines.run(command, environment={**self.environment, **(environment or {})}, folder=folder)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What slurmctld knows of the job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job_id: str, states: Sequence[str], seconds: float) -> dict[str, str]:
        """Waits until the job has one of the states, and returns what is known of it."""
        wait_until(f"job {job_id} is {' or '.join(states)}", lambda: self.job(job_id)["JobState"] in states, seconds)
        return self.job(job_id)


_MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "log-file": "log",
    "pid-file": "pid",
    "seed-file": "seed",
}
