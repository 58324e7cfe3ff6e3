"""Sampling parameters of the questions that `ee-tuning regenerate` asks: answers, continuations, and prompts of the
model's own.
"""

import hashlib
from dataclasses import dataclass, replace

from ee_tuning.config import GenerationSection
from ee_tuning.data.chat_template import ChatTemplate
from ee_tuning.generation.chat import stop_ids_of
from ee_tuning.generation.dialogues import MOST_OF_A_PROMPT, Question
from ee_tuning.generation.llm import EarlyExitLLM, Job
from ee_tuning.generation.options import params_of
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.sampling.policy import FULL


@dataclass(frozen=True)
class QuestionParams:
    """Sampling parameters of a dialogue's questions."""

    answer: SamplingParams
    """Those of an answer in a chat, which the template's end of turn ends."""
    text: SamplingParams
    """Those of a text's continuation."""
    prompt: SamplingParams | None
    """Those of a prompt that the model writes: a sample of what users ask, as in Magpie (arXiv 2406.08464)."""

    @classmethod
    def of(
        cls, llm: EarlyExitLLM, options: GenerationSection, template: ChatTemplate, *, has_own: bool
    ) -> "QuestionParams":
        """Reads `options` and the template; `has_own` tells whether there are prompts that the model writes."""
        text, ends = replace(params_of(options), n=1), stop_ids_of(llm, template)
        prompt = _prompt_params(template, ends, options.seed) if has_own else None
        return cls(replace(text, stop_token_ids=ends), text, prompt)

    def job(self, question: Question) -> Job:
        """Returns the question as a request with a seed of its own: answers to one prompt are drawn independently, in
        each turn, and the first equals that of n = 1; so are all prompts.
        """
        if question.own_prompt is not None:
            assert self.prompt is not None
            params = _with_seed_of(self.prompt, f"prompt {question.own_prompt}")
        else:
            params = self.answer if question.is_rendered else self.text
            params = _with_seed_of(params, str(question.sample)) if question.sample else params
        return Job(question.text, params, FULL, adds_special_tokens=not question.is_rendered)


def _prompt_params(template: ChatTemplate, ends_of_turn: tuple[int, ...], seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=MOST_OF_A_PROMPT,
        temperature=1.0,
        top_p=0.95,
        seed=seed,
        stop=(template.user_turn().end,),
        stop_token_ids=ends_of_turn,
    )


def _with_seed_of(params: SamplingParams, name: str) -> SamplingParams:
    seed = int.from_bytes(hashlib.sha256(f"{params.seed}/{name}".encode()).digest()[:7])
    return replace(params, seed=seed)
