"""`ee-tuning demo --llm`: all steps with a real LLM, SmolLM2-135M-Instruct, by the commands a user would type.

Its own answers → exits fitted and tuned on them → calibrated thresholds → quality and speed on a held-out task →
report.json and a picture. A finished step is not repeated: the same command continues after it.
"""

import json
import shutil
from functools import partial
from pathlib import Path

from rich.console import Console

from ee_tuning.command_steps import Flag, Step, ee_tuning, run_command, run_steps
from ee_tuning.data.sample_corpus import documentation_strings, sample_corpus
from ee_tuning.demo.demo_model import smollm2
from ee_tuning.demo.demo_report import print_summary, write_report
from ee_tuning.errors import InputError
from ee_tuning.json_file import to_json
from ee_tuning.line_file import read_lines

MARK = ".ee_tuning_demo_llm"
TASK = Path(__file__).resolve().parents[2] / "examples" / "tasks" / "facts.jsonl"
LAYERS, VOCAB = "4,24,28", 4096
"""The first exit is cheap and drafts; the others are right often enough for tokens to leave there."""
AGREEMENTS = (0.95, 0.9)
"""Wanted agreement with the full model at an exit, of a careful calibration and a bold one."""
NUM_ASKED = 200
"""Questions of the task that are measured. The model's answers to the others train the exits."""
NUM_PROMPTS, ANSWER_TOKENS, HELD_OUT = 160, 96, 5
"""Further prompts that the model answers for training; tokens per answer; one answer of this many is held out."""
DOCUMENTATION = 30_000
"""Characters of Python's docstrings in the training data."""
STEPS, SEQUENCE, BATCH = 36, 256, 4


class Demo:
    """One run of the demo in a folder."""

    def __init__(self, folder: Path, console: Console):
        self.folder, self.console = folder, console
        self.model, text = folder / "SmolLM2-135M-Instruct.gguf", folder / "text"
        self.questions, self.answers = text / "questions.jsonl", text / "answers.jsonl"
        self.train, self.held_out = text / "train.jsonl", text / "held_out.jsonl"
        self.converted, self.tuned = folder / "converted", folder / "run" / "exit_heads"
        self.calibrations = [folder / f"calibration-{agreement:.0%}.json".replace("%", "") for agreement in AGREEMENTS]
        self.evaluation = folder / "evaluation" / "evaluation.json"
        self.report = folder / "report.json"

    def steps(self) -> list[Step]:
        """Lists all steps. Minutes are for two idle cores."""
        return [
            Step("take the model", self.model, self._take_model, minutes=0.2),
            Step("have the model answer prompts, for its exits to learn", self.answers, self._answer, minutes=3),
            Step(
                f"put exits behind layers {LAYERS}, fitted by least squares", self.converted, self._convert, minutes=1
            ),
            Step(f"tune them, {STEPS} steps", self.tuned, self._tune, minutes=1.5),
            *(
                Step(
                    f"find the confidence from which {agreement:.0%} of each exit's tokens are the full model's",
                    file,
                    partial(self._calibrate, agreement, file),
                    minutes=0.4,
                )
                for agreement, file in zip(AGREEMENTS, self.calibrations, strict=True)
            ),
            Step("measure quality and speed on a held-out task", self.evaluation, self._evaluate, minutes=6.5),
            Step("report", self.report, lambda: write_report(self.folder, self.calibrations[0]), minutes=0.5),
        ]

    def _run(self, command: str, **flags: Flag) -> None:
        run_command(self.console, ee_tuning(command, model=self.model, **flags))

    def _take_model(self) -> None:
        self.model.unlink(missing_ok=True)  # a link into a package that was removed
        self.model.symlink_to(smollm2(self.folder / "package", self.console).resolve())

    def _answer(self) -> None:
        self.answers.parent.mkdir(exist_ok=True)
        self.questions.write_text("\n".join(read_lines(TASK)[NUM_ASKED:]) + "\n", encoding="utf-8")
        self._run(
            "regenerate",
            data=self.questions,
            shipped_prompts=NUM_PROMPTS,
            max_new_tokens=ANSWER_TOKENS,
            output=self.answers,
        )

    def _convert(self) -> None:
        self._write_texts()
        self._run(
            "convert",
            exit_layers=LAYERS,
            architecture="norm",
            output_vocab=VOCAB,
            init="fitted",
            data=self.train,
            seq_length=SEQUENCE,
            output=self.converted,
        )

    def _write_texts(self) -> None:
        """Writes training answers with some of Python's documentation, and held-out answers."""
        answers = read_lines(self.answers)
        documentation, size = list[str](), 0
        for text in documentation_strings(sample_corpus()[0]):
            if (size := size + len(text)) > DOCUMENTATION:
                break
            documentation.append(to_json({"text": text}))
        learned = [line for place, line in enumerate(answers) if place % HELD_OUT]
        self.held_out.write_text("\n".join(answers[::HELD_OUT]) + "\n", encoding="utf-8")
        self.train.write_text("\n".join(learned + documentation) + "\n", encoding="utf-8")

    def _tune(self) -> None:
        self._run(
            "tune",
            exits=self.converted,
            data=self.train,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            global_batch_size=BATCH,
            train_iters=STEPS,
            lr="3e-4",
            set=[f"data.valid_paths={self.held_out}", "tuning.eval_interval=0"],
            output=self.tuned.parent,
        )

    def _calibrate(self, agreement: float, file: Path) -> None:
        self._run(
            "calibrate",
            exits=self.tuned,
            data=self.held_out,
            agreement=agreement,
            measure="max_probability",
            output=file,
        )

    def _evaluate(self) -> None:
        self._run(
            "evaluate",
            exits=self.tuned,
            task=TASK,
            metric="contains",
            limit=NUM_ASKED,
            thresholds="none",
            calibration=[*self.calibrations],
            speculative=True,
            output=self.evaluation.parent,
        )


def demo_llm(output: Path) -> None:
    """Runs the demo into the folder `output`.

    Raises InputError outside of a checkout of the project, which has the task, where `output` holds anything else, and
    where a step fails.
    """
    if not TASK.is_file():
        raise InputError(
            f"demo --llm must run from a checkout of the project, which carries the task; {TASK} is not there"
        )
    console = Console(highlight=False)
    _begin(output)
    demo = Demo(output, console)
    steps = demo.steps()
    left = [step for step in steps if not step.makes.exists()]
    console.print(
        f"SmolLM2-135M-Instruct, {len(steps)} steps into {output}; {len(left)} are left, about "
        f"{sum(step.minutes for step in left):.0f} minutes on two quiet cores. The same command continues a stopped demo",
        soft_wrap=True,
    )
    seconds = run_steps(console, steps)
    print_summary(console, json.loads(demo.report.read_text(encoding="utf-8")), output, seconds)


def _begin(output: Path) -> None:
    """Creates the folder, or reuses that of an earlier demo without results of other settings."""
    job = to_json(
        {
            "layers": LAYERS,
            "vocab": VOCAB,
            "prompts": [NUM_ASKED, NUM_PROMPTS, ANSWER_TOKENS, HELD_OUT, DOCUMENTATION],
            "tuning": [STEPS, SEQUENCE, BATCH],
            "agreement": AGREEMENTS,
        }
    )
    output.mkdir(parents=True, exist_ok=True)
    mark = output / MARK
    if not mark.is_file():
        if any(output.iterdir()):
            raise InputError(
                f"demo --llm must write into a new folder or that of an earlier one, and {output} holds something else; give "
                "another --output"
            )
    elif mark.read_text(encoding="utf-8") != job:
        for made in ("text", "converted", "run", "evaluation"):
            shutil.rmtree(output / made, ignore_errors=True)
        for file in (*output.glob("calibration-*.json"), output / "report.json"):
            file.unlink(missing_ok=True)
    mark.write_text(job, encoding="utf-8")
