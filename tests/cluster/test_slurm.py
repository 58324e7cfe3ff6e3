"""The examples' scripts on a real Slurm of two nodes: what ends a job in the middle, and what comes of it then."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import wait_until
from run_folders import same_heads_and_records
from slurm import Slurm, missing_for_slurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
if reason := missing_for_slurm():
    pytest.skip(reason, allow_module_level=True)

SECONDS = float(os.environ.get("EE_TUNING_CLUSTER_SECONDS", "400"))
"""What a job may take to the next thing that is awaited, its start included."""
NUM_STEPS = 60
SMALLER = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--nice=0")
"""In place of the script's eight GPUs a node. The rest of it stays."""
FLAGS = (
    *("--model", "examples/tiny-python-llama", "--data", "my data", "--exit-layers", "3,6,9,12"),
    *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    *("--train-iters", str(NUM_STEPS), "--micro-batch-size", "2", "--global-batch-size", "4", "--seq-length", "64"),
    *("--set", "tuning.save_interval=10"),
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Job:
    """One `sbatch` of llama-3.1-70b's script, into a run folder."""

    def __init__(self, slurm: Slurm, project: Path, environment: dict[str, str], run: str) -> None:
        self.slurm, self.run = slurm, project / run
        script = "examples/llama-3.1-70b/slurm.sh"
        command = ["sbatch", "--parsable", *SMALLER, "--time=30", "--signal=USR1@60", script, *FLAGS, "--output", run]
        self.id = slurm.ask(*command, folder=project, environment=environment)
        self.log = project / f"slurm-{self.id}.log"

    def step(self) -> int:
        """The last step in the records."""
        records = self.run / "metrics.jsonl"
        return json.loads(records.read_text().splitlines()[-1])["step"] if records.exists() else 0

    def restarts(self) -> int:
        return int(self.slurm.job(self.id)["Restarts"])

    def wait_for_end(self) -> str:
        wait_until(f"job {self.id} ends", lambda: self.slurm.job(self.id)["JobState"] in ENDS, SECONDS)
        state = self.slurm.job(self.id)["JobState"]
        assert state == "COMPLETED", (state, self.log.read_text(errors="replace")[-3000:])
        return self.log.read_text(errors="replace")


ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def stands_still(slurm: Slurm, process: int) -> bool:
    """Whether the process is there and stopped."""
    status = slurm.machines.run(["cat", f"/proc/{process}/status"]).stdout
    return any(line.startswith("State:") and line.split()[1] == "T" for line in status.split("\n"))


def cancel_during_a_save(slurm: Slurm, job: Job) -> None:
    saves = job.run / "checkpoints"
    wait_until("a checkpoint is being written", lambda: any(saves.glob("*.partial-*")), SECONDS, pause=0.005)
    slurm.ask("scancel", job.id)
    slurm.wait_for(job.id, ["CANCELLED"], 60)
    wait_until("its processes are gone", lambda: not slurm.machines.ranks("node2"), 60)


def let_its_time_run_out(slurm: Slurm, job: Job) -> None:
    """The ranks of node1 stand still, so that they can not be done before Slurm signals; it wakes what it signals."""
    before = job.step()
    wait_until("it has gone on", lambda: job.step() > before, SECONDS)
    ranks = slurm.machines.ranks("node1")
    assert len(ranks) == 2, ranks
    slurm.machines.signal("STOP", ranks)
    hours, minutes, seconds = map(int, slurm.job(job.id)["RunTime"].split(":"))
    slurm.ask("scontrol", "update", f"JobId={job.id}", f"TimeLimit={hours * 60 + minutes + 1 + (seconds > 45)}")
    wait_until("--signal came", lambda: not any(stands_still(slurm, each) for each in ranks), 150)
    wait_until("it is queued again", lambda: job.restarts() == 1, 90)
    more = ["scontrol", "update", f"JobId={job.id}", "TimeLimit=30"]  # refused while the job is still completing
    wait_until("it has time again", lambda: slurm.machines.run(more, environment=slurm.environment).returncode == 0, 90)


def let_a_node_die(slurm: Slurm, job: Job) -> None:
    before = job.step()
    wait_until("it has gone on", lambda: job.step() > before, SECONDS)
    slurm.machines.crash("node2")
    wait_until("Slurm has taken it back", lambda: job.restarts() == 2, 120)
    slurm.start_node("node2")


def test_a_job_goes_on_to_the_same_bits_whatever_ends_it(
    slurm: Slurm, project: Path, python_first: dict[str, str]
) -> None:
    """A job that is cancelled while it saves and can not go on; one whose time runs out and that is done for; one that
    loses a node and fails before Slurm misses the node, so that it does not come again; steps that are lost or taken
    twice.
    """
    whole = Job(slurm, project, python_first, "runs/never stopped")
    whole.wait_for_end()
    first = Job(slurm, project, python_first, "runs/often stopped")
    cancel_during_a_save(slurm, first)
    job = Job(slurm, project, python_first, "runs/often stopped")
    let_its_time_run_out(slurm, job)
    let_a_node_die(slurm, job)
    said = job.wait_for_end()
    assert job.restarts() == 2 and "wrote runs/often stopped/exit_heads" in said
    assert "Traceback" not in said and "in vain: " in said
    same_heads_and_records(job.run, whole.run)


def test_an_array_completes_each_prompt_once(slurm: Slurm, project: Path, python_first: dict[str, str]) -> None:
    """Prompts that two tasks complete, or none; shares that `cat` joins in another order."""
    prompts = [{"prompt": f"def f{number}(", "id": number} for number in range(5)]
    (project / "my prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))
    flags = ["--model", "examples/tiny-python-llama", "--policy", "full", "--max-new-tokens", "4"]
    small = ["--array=0-1", "--gpus=1", "--cpus-per-task=1"]
    script = ["examples/generate_array.sh", "my prompts.jsonl", "my completions", *flags]
    job_id = slurm.ask("sbatch", "--parsable", *small, *script, folder=project, environment=python_first)
    for task in (0, 1):
        state = slurm.wait_for(f"{job_id}_{task}", sorted(ENDS), SECONDS)["JobState"]
        assert state == "COMPLETED", (project / f"slurm-{job_id}_{task}.log").read_text()
    shares = sorted((project / "my completions").glob("share-*.jsonl"))
    lines = [json.loads(line) for path in shares for line in path.read_text().splitlines()]
    assert len(shares) == 2 and [each["id"] for each in lines] == [each["id"] for each in prompts]


def test_tasks_of_srun_work_together(slurm: Slurm, project: Path, python_first: dict[str, str]) -> None:
    """`srun ee-tuning evaluate`: two tasks that each evaluate everything, into one folder."""
    tasks = [{"prompt": f"def f{number}(", "answer": "self"} for number in range(2)]
    (project / "my task.jsonl").write_text("".join(json.dumps(each) + "\n" for each in tasks))
    command = ["srun", "--nodes=2", "--ntasks=2", "python", "-m", "ee_tuning", "evaluate"]
    command += ["--model", "examples/tiny-python-llama", "--exits", "runs/never stopped/exit_heads"]
    command += ["--task", "my task.jsonl", "--metric", "contains", "--output", "my evaluation", "--max-new-tokens", "4"]
    command += ["--thresholds", "0.8", "--pipeline-model-parallel-size", "2"]
    done = slurm.machines.run(
        command, environment={**slurm.environment, **python_first}, folder=project, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert (project / "my evaluation" / "evaluation.json").exists()


def test_a_mistake_ends_the_job_in_one_line(slurm: Slurm, project: Path, python_first: dict[str, str]) -> None:
    """A job that is queued for ever, because what a user got wrong looks like a fault of the machine."""
    script = ["examples/llama-2-7b/slurm.sh", "--model", "no such folder"]
    small = ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    job_id = slurm.ask("sbatch", "--parsable", *small, *script, folder=project, environment=python_first)
    known = slurm.wait_for(job_id, sorted(ENDS), SECONDS)
    assert (known["JobState"], known["ExitCode"], known["Restarts"]) == ("FAILED", "2:0", "0")
    said = (project / f"slurm-{job_id}.log").read_text()
    assert said.count("ee-tuning: error: ") == 1 and "Traceback" not in said
    shutil.rmtree(project / "runs" / "llama-2-7b", ignore_errors=True)
