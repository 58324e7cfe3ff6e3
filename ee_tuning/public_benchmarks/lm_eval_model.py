"""The model class for lm-evaluation-harness (`--model ee-tuning`): log-likelihoods and completions under a policy.

Prompts, special tokens, windows and truncation equal those of the harness's own `hf` model, so that both agree at full
depth.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ee_tuning.data.chat_template import ChatTemplate
from ee_tuning.data.tokenizer import beginning_ids, begun
from ee_tuning.errors import InputError
from ee_tuning.generation.job import Job
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.options import with_options
from ee_tuning.generation.scoring import TokenPair
from ee_tuning.public_benchmarks.driver import Driver, TextScore
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import Policy

NAME = "ee-tuning"
MAX_NEW_TOKENS = 256
"""Default number of tokens of a completion, as in the harness's other models."""
_BATCHES_AT_A_TIME = 16
"""Batches between two updates of the progress bar."""
_SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
_OF_THE_HARNESS = ("until", "max_gen_toks", "do_sample")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}

Item = TypeVar("Item")
Result = TypeVar("Result")


@register_model(NAME)
class EarlyExitLM(TemplateLM):
    """A model whose tokens leave by a policy."""

    def __init__(
        self,
        model: str | None = None,
        exits: str | None = None,
        *,
        driver: Driver | None = None,
        given: Policy | None = None,
        batch_size: int | str | None = None,
        chat_template: str | None = None,
        dtype: str | None = None,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        trust_remote_code: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Loads model and exits, unless a `driver` has them. Under torchrun all ranks then run the harness.

        The policy is `given`, or described by `options`, keys of the `generation` section. `chat_template` is a
        template, or the name of one of the tokenizer's. `device` and `max_batch_size`, which the harness passes to
        every model, are ignored. Raises InputError.
        """
        super().__init__()
        if driver is None:
            if model is None:
                raise InputError(
                    f"the model {NAME} needs a model's folder or file, got none; give --model_args model=FOLDER,exits=FOLDER"
                )
            driver = Driver(
                EarlyExitLLM.load(
                    model,
                    exits,
                    dtype=dtype,
                    tensor_model_parallel_size=int(tensor_model_parallel_size),
                    pipeline_model_parallel_size=int(pipeline_model_parallel_size),
                    trust_remote_code=trust_remote_code,
                )
            )
        self.driver, llm = driver, driver.llm
        self.policy = given or llm.policy(with_options(llm.defaults, options))
        self.tokenizer, self._beginning = llm.tokenizer, beginning_ids(llm.tokenizer)
        self.batch_size = batch_rows(batch_size, llm.defaults.max_batch_size)
        self._template = ChatTemplate(llm.tokenizer, chat_template)
        self.left: dict[str, Counter[int]] = {"loglikelihood": Counter(), "generate_until": Counter()}
        """Kind of request -> layer -> number of tokens that left there."""

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-text token. Raises InputError where it has none."""
        if (token := self.tokenizer.eos_token_id) is None:
            raise InputError(
                f"the tokenizer in {self.tokenizer.name_or_path} must have an end-of-text token, got none; set eos_token in "
                "its tokenizer_config.json"
            )
        return int(token)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """Number of positions of the model."""
        return self.driver.llm.model.plan.max_length

    @property
    def tokenizer_name(self) -> str:
        """The key under which the harness caches prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns token ids, with leading special tokens unless the text contains them or `add_special_tokens` is
        False.
        """
        ids: list[int] = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        return ids if add_special_tokens is False else begun(ids, self._beginning)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template, for the record of a run."""
        return self._template.source() if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a chat; its last message stays open without `add_generation_prompt`. A refused system message is left
        out.
        """
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self._template.render(chat_history, **options))
        except InputError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return str(self._template.render(others, **options))

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns for each continuation its log-probability, and whether it is the greedy one of the exits used."""
        scores = self._scores([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns log-likelihoods of whole texts, in windows of the model's context, with each token counted once."""
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            for request in requests
        ]
        scores = iter(self._scores(list(itertools.chain(*windows)), disable_tqdm))
        answers = [sum(score.logprob for score in itertools.islice(scores, len(each))) for each in windows]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns a completion of each prompt, without its stop string. A repeated request is sampled with another
        seed.
        """
        again, jobs = Counter[int](), list[Job]()
        for request in requests:
            context, kwargs = request.args
            jobs.append(self._job(context, kwargs, again[id(request)]))
            again[id(request)] += 1
        made = self._in_parts(
            "generate_until",
            jobs,
            lambda part: self.driver.complete(part, self.batch_size),
            lambda job: len(job.prompt_ids),
            disable_tqdm,
        )
        answers = list[str]()
        for request, job, completion in zip(requests, jobs, made, strict=True):
            self.left["generate_until"].update(completion.exit_layers)
            answers.append(postprocess_generated_text(completion.text, list(job.params.stop), None))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _scores(self, pairs: list[TokenPair], disable_tqdm: bool) -> list[TextScore]:
        longest = self.max_length + 1
        cut = [
            (context[max(0, len(context) + len(continuation) - longest) :], continuation)
            for context, continuation in pairs
        ]
        scores = self._in_parts(
            "loglikelihood",
            cut,
            lambda part: self.driver.score(part, self.policy, self.batch_size),
            lambda pair: len(pair[0] + pair[1]),
            disable_tqdm,
        )
        for score in scores:
            self.left["loglikelihood"].update(score.left)
        return scores

    def _job(self, context: str, kwargs: dict[str, Any], again: int) -> Job:
        """Raises InputError on unsupported keys."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, MAX_NEW_TOKENS))
        wrong = [key for key in known if key not in (*_SAMPLING, *_OF_THE_HARNESS) and known[key] != _NEUTRAL.get(key)]
        if wrong:
            raise InputError(
                f"generation_kwargs of a task must be among {', '.join((*_OF_THE_HARNESS, *_SAMPLING))}, got {wrong[0]}; "
                "leave it out, or take the harness's model hf"
            )
        sampling = {"seed": self.driver.llm.defaults.seed, **{key: known[key] for key in _SAMPLING if key in known}}
        sampling["temperature"] = sampling.get("temperature", 1.0) if known.get("do_sample") else 0.0
        stop = handle_stop_sequences(list(known["until"]), eos=self.tokenizer.decode([self.eot_token_id]))
        limit = self.max_length - known["max_gen_toks"]
        if limit < 1:
            raise InputError(
                f"max_gen_toks of a task must be below the {self.max_length} tokens that the model has positions for, got "
                f"{known['max_gen_toks']}; set it by --gen-kwargs or in the task"
            )
        params = SamplingParams(
            max_tokens=known["max_gen_toks"],
            stop=tuple(filter(None, stop)),
            **{**sampling, "seed": sampling["seed"] + again},
        )
        return Job(
            context,
            params,
            self.policy,
            prompt_ids=tuple((self.tok_encode(context) or [self.prefix_token_id])[-limit:]),
        )

    def _in_parts(
        self,
        what: str,
        items: Sequence[Item],
        action: Callable[[list[Item]], list[Result]],
        length: Callable[[Item], int],
        disable_tqdm: bool,
    ) -> list[Result]:
        """Processes items longest first, so that a lack of memory shows at once. Returns results in the order of the
        items.
        """
        order = sorted(range(len(items)), key=lambda place: -length(items[place]))
        found: dict[int, Result] = {}
        with tqdm(total=len(items), disable=disable_tqdm, desc=f"{what} requests") as bar:
            for places in _parts(order, _BATCHES_AT_A_TIME * self.batch_size):
                found.update(zip(places, action([items[place] for place in places]), strict=True))
                bar.update(len(places))
        return [found[place] for place in range(len(items))]


def batch_rows(given: int | str | None, default: int) -> int:
    """Parses the harness's batch_size; `auto` is the default. Raises InputError on another word, or a number below
    1.
    """
    words = "" if given is None else str(given)
    if not words or words.startswith("auto"):
        return default
    if not words.isdecimal() or int(words) < 1:
        raise InputError(f"--batch-size must be a whole number of at least 1, or auto, got {words}")
    return int(words)


def _parts(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[first : first + size] for first in range(0, len(order), size))
