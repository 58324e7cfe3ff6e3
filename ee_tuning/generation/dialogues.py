"""Answers prompts in rounds: each round asks for the next answer of every unfinished dialogue. A prompt that the model
writes itself is a round of its own, before that of its answer.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ee_tuning.data.chat import ASSISTANT, is_mid_thought
from ee_tuning.data.chat_template import ChatTemplate
from ee_tuning.data.messages import Where
from ee_tuning.data.prompt_records import Message, Prompt
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.record import Record
from ee_tuning.notices import say

MARK = "regenerated"
"""Key of a record for its place among the prompts and for the job that made it."""
CUT = "length"
MOST_OF_A_PROMPT = 256
"""Most tokens of a prompt that the model writes."""
_MOST_PRINTED = 10


class Question(NamedTuple):
    """A text for the model to continue."""

    text: str
    is_rendered: bool
    """Whether a chat template rendered it, special tokens included."""
    sample: int
    """Number of the answer among the prompt's."""
    own_prompt: int | None = None
    """Place of the prompt, where it is that which has to be written, and not an answer."""


@dataclass(eq=False)
class Dialogue:
    """A prompt and one set of answers to it, possibly unfinished."""

    prompt: Prompt
    place: int
    """Place of the prompt in the input."""
    index: int
    """Number of the set among the prompt's."""
    answers: list[str] = field(default_factory=list)
    finish_reason: str = ""
    """Finish reason of the last answer."""
    is_over: bool = False
    """Whether it has all its answers, or can get no further one."""

    @property
    def messages(self) -> list[Message]:
        """Messages of a chat up to the last answer."""
        pairs = zip(self.prompt.turns, self.answers, strict=False)
        return [message for turn, answer in pairs for message in (*turn, {"role": ASSISTANT, "content": answer})]

    def question(self, template: ChatTemplate) -> Question:
        """The next question. Raises InputError where the template refuses it."""
        if self.prompt.is_own:
            return Question(template.user_turn().beginning, True, self.index, own_prompt=self.place)
        if not self.prompt.turns:
            return Question(self.prompt.text, False, self.index)
        messages = [*self.messages, *self.prompt.turns[len(self.answers)]]
        return Question(template.render(messages, self.prompt.tools, add_generation_prompt=True), True, self.index)

    def take_prompt(self, text: str) -> None:
        """Takes the user's message that the model wrote."""
        self.prompt = replace(self.prompt, turns=([{"role": "user", "content": text.strip()}],), is_own=False)

    def record(self) -> Record:
        """The dialogue as a line of data. `tune` learns only its answers."""
        body: dict[str, Any] = {"messages": self.messages}
        if not self.prompt.turns:
            body = {"prompt": self.prompt.text, "completion": self.answers[0]}
        elif self.prompt.is_given:
            *given, answer = self.messages
            body = {"prompt": given, "completion": [answer]}
        tools = {"tools": self.prompt.tools} if self.prompt.tools else {}
        return {
            **self.prompt.kept,
            **body,
            **tools,
            "finish_reason": self.finish_reason,
            MARK: {"prompt_index": self.place, "index": self.index},
        }


@dataclass(kw_only=True)
class Tally:
    """Counts of this process's dialogues."""

    answered: int = 0
    cut: int = 0
    """Number of answered dialogues whose last answer is cut."""
    shortened: int = 0
    """Number of answered dialogues that lack later answers."""
    left_out: int = 0
    first_reason: str = ""
    """Place and reason of the first dialogue that was left out."""


class Dialogues:
    """All dialogues of a job, processed a few at a time."""

    def __init__(
        self,
        dialogues: Iterable[Dialogue],
        template: ChatTemplate,
        *,
        at_a_time: int,
        drops_cut: bool,
        wheres: Sequence[Where],
    ):
        """`at_a_time` dialogues are finished before others begin. With `drops_cut` a cut answer is dropped and ends its
        dialogue. `wheres` holds the places of the prompts in their files.
        """
        self.tally = Tally()
        self._coming: Iterator[Dialogue] = iter(dialogues)
        self._asked: list[tuple[Dialogue, Question]] = []
        self._template, self._at_a_time, self._drops_cut, self._wheres = template, at_a_time, drops_cut, wheres
        self._ended: list[Record | None] = []
        self._told: tuple[str, Where] | None = None

    def next_round(self) -> list[Question]:
        """Returns the next questions, or none where all dialogues are over."""
        questions: list[Question] = []
        while not questions:
            dialogues = [each for each, _ in self._asked if not each.is_over] or list(
                itertools.islice(self._coming, self._at_a_time)
            )
            if not dialogues:
                return []
            self._asked = []
            for dialogue in dialogues:
                try:
                    questions.append(dialogue.question(self._template))
                    self._asked.append((dialogue, questions[-1]))
                except InputError as error:
                    self._break_off(dialogue, str(error))
        return questions

    def take(self, number: int, completion: Completion) -> None:
        """Takes the answer to question `number` of the round. An error may come twice."""
        dialogue, question = self._asked[number]
        if dialogue.is_over:
            return
        is_cut = completion.finish_reason == CUT
        if completion.error:
            self._break_off(dialogue, completion.error)
        elif not completion.text.strip():
            self._break_off(dialogue, f"the model's {'answer' if question.own_prompt is None else 'prompt'} is empty")
        elif question.own_prompt is not None:
            if is_cut:
                self._break_off(
                    dialogue, f"the model's prompt has no end within {MOST_OF_A_PROMPT} tokens and its context"
                )
            else:
                dialogue.take_prompt(completion.text)
        elif is_cut and self._drops_cut:
            self._break_off(dialogue, "the answer was cut at max_new_tokens, or the end of the model's context")
        elif is_cut and question.is_rendered and is_mid_thought(question.text, completion.text):
            self._break_off(
                dialogue, "the answer was cut within its thought, before it said anything; give more --max-new-tokens"
            )
        else:
            dialogue.answers.append(completion.text)
            dialogue.finish_reason = completion.finish_reason
            if len(dialogue.answers) == dialogue.prompt.num_answers or is_cut:
                self._end(dialogue)

    def ended(self) -> list[Record | None]:
        """Records of dialogues that ended since the last call; None for one that was left out."""
        ended, self._ended = self._ended, []
        return ended

    def _end(self, dialogue: Dialogue) -> None:
        dialogue.is_over = True
        self.tally.answered += 1
        self.tally.cut += dialogue.finish_reason == CUT
        self.tally.shortened += len(dialogue.answers) < dialogue.prompt.num_answers
        self._ended.append(dialogue.record())

    def _break_off(self, dialogue: Dialogue, reason: str) -> None:
        """Ends a dialogue without a further answer. Its earlier answers are kept."""
        if dialogue.answers:
            self._end(dialogue)
            return
        dialogue.is_over = True
        self.leave_out(reason, self._wheres[dialogue.place])
        self._ended.append(None)

    def leave_out(self, reason: str, where: Where) -> None:
        """Counts a prompt without a record once, however many samples it has, and prints the first few to stderr."""
        if self._told == (reason, where):
            return
        self._told = reason, where
        self.tally.left_out += 1
        if self.tally.left_out > _MOST_PRINTED:
            return
        told = f"{where()}: {reason}"
        self.tally.first_reason = self.tally.first_reason or told
        more = " (others are counted at the end)" if self.tally.left_out == _MOST_PRINTED else ""
        say(f"left out {told}{more}")
