"""`ee-tuning regenerate`: the full model answers prompts, as data for tuning its exits. Rank 0 reads and writes."""

import dataclasses
import hashlib
import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ee_tuning.config import Config, GenerationSection, replace
from ee_tuning.data.chat_template import ChatTemplate, read_chat_template
from ee_tuning.data.documents import file_ranges, read_records
from ee_tuning.data.file_kind import named_format
from ee_tuning.data.messages import Where
from ee_tuning.data.piped import copied, has_pipes
from ee_tuning.data.prompt_records import Prompt, PromptFormat, prompt_of
from ee_tuning.data.records import LeftOut
from ee_tuning.data.shipped_prompts import shipped_prompts
from ee_tuning.data.sources import find_corpora
from ee_tuning.data.tally import print_passed_over
from ee_tuning.data.tokenizer import load_tokenizer, tokenizer_of
from ee_tuning.errors import InputError
from ee_tuning.generation.completion import Completion
from ee_tuning.generation.delivery import CompletionProgress
from ee_tuning.generation.dialogues import MARK, Dialogue, Dialogues
from ee_tuning.generation.llm import EarlyExitLLM
from ee_tuning.generation.many import closed_at_the_end, model_settings
from ee_tuning.generation.options import params_of
from ee_tuning.generation.output_file import Form, Key, OutputFile, Settings, check_output, is_stream, owned_output
from ee_tuning.generation.question_params import QuestionParams
from ee_tuning.generation.shared_decoding import decode_shared
from ee_tuning.json_file import to_json
from ee_tuning.notices import say
from ee_tuning.parallel.collectives import on_first_rank
from ee_tuning.parallel.topology import Topology, destroy_parallel, init_parallel
from ee_tuning.sampling.params import SamplingParams
from ee_tuning.storage.apart import check_beside

FORM = Form("regenerate", under=MARK)
_BATCHES_AT_A_TIME, _BATCHES_OF_LONG = 64, 8
"""Batches of dialogues at a time on each replica: where each has one answer, which is stored at once, and where some
have several, which a kill loses.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """The command's options beside its job."""

    output: Path
    overwrites: bool = False
    num_shipped: int = 0
    """Number of the package's own prompts to answer, beside those of data.paths."""
    num_own: int = 0
    """Number of prompts that the model writes itself."""
    limit: int | None = None
    """Most prompts."""
    as_chat: bool = False
    """Whether a text is a user's message; see `PromptFormat`."""
    last_turn: bool = False
    """Whether only the last answer of a chat is generated; see `PromptFormat`."""
    drops_cut: bool = False


@dataclasses.dataclass
class _Prompts:
    """The prompts that rank 0 read."""

    prompts: list[Prompt] = dataclasses.field(default_factory=list)
    wheres: list[Where] = dataclasses.field(default_factory=list)
    left_out: list[LeftOut] = dataclasses.field(default_factory=list)

    def digest(self) -> str:
        """Digest of everything in the prompts, kept keys included."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update((to_json(dataclasses.asdict(prompt), sort_keys=True, default=str) + "\n").encode())
        return digest.hexdigest()


def regenerate(config: Config, wish: Wish) -> None:
    """Writes the full model's answers to the prompts, in their order, to `wish.output`. Answers of an interrupted
    command are kept.

    Raises InputError, before the model is loaded, on files, options and an output that can not be used, and where no
    prompt can be answered. A single prompt that can not be answered is left out.
    """
    topology = init_parallel(config.parallel)
    _check(config)
    # Exits are not evaluated, nor are log-probabilities requested.
    config = replace(
        config,
        exits={"path": None},
        generation={"policy": "full", "calibration": None, "logprobs": None, "budget": None},
    )
    read = _Prompts()
    on_first_rank(topology, lambda: _read(config, wish, read))
    with owned_output(wish.output, topology):
        _regenerate(config, topology, wish, read)
    destroy_parallel()


def _regenerate(config: Config, topology: Topology, wish: Wish, read: _Prompts) -> None:
    llm = EarlyExitLLM.from_config(config, topology)
    options, _ = llm.jobs([])
    params = params_of(options)
    params.check(llm.model.config.vocab_size)
    opened: list[OutputFile] = []

    def open_output() -> bool:
        opened.append(OutputFile(wish.output, _settings(llm, config, wish, params, read), None, wish.overwrites, FORM))
        return opened[0].is_whole

    if on_first_rank(topology, open_output):
        if topology.is_logging_rank:
            say(f"{wish.output} has the answers of this job already: nothing is left to do; --overwrite makes it anew")
    else:
        _answer(llm, config, wish, options, read, opened[0] if opened else None)


def _check(config: Config) -> None:
    generation = config.generation
    if generation.n > 1 and generation.temperature == 0:
        raise InputError(
            f"generation.n = {generation.n} answers to a prompt would all be the same at temperature 0; give --temperature, "
            "0.7 for example"
        )


def _read(config: Config, wish: Wish, read: _Prompts) -> None:
    """Fills `read`. Writes nothing."""
    if named_format(wish.output.name) != "lines" or wish.output.suffix.lower() in (".gz", ".zst", ".bz2", ".xz"):
        raise InputError(f"--output must end in .jsonl, for which tune reads a record a line, got {wish.output}")
    if wish.output.exists() and is_stream(wish.output):
        raise InputError(
            f"--output must name a file, beside which answers are kept until all are made, got {wish.output}"
        )
    check_beside(wish.output, config, config.data.paths)
    check_output(wish.output, wish.overwrites, FORM)
    if wish.num_own < 0:
        raise InputError(f"--own-prompts must be a number of prompts, got {wish.num_own}")
    if not config.data.paths and not wish.num_shipped and not wish.num_own:
        raise InputError(
            "regenerate needs prompts, got none; give --data FILE, --shipped-prompts N for N of those that come with "
            "ee-tuning, or --own-prompts N for N that the model writes itself"
        )
    given = read_chat_template(config.data.chat_template)
    tokenizer = load_tokenizer(tokenizer_of(config), trusts_code=config.model.trust_remote_code)
    reading = PromptFormat(
        text_key=config.data.text_key,
        has_template=bool(given or tokenizer.chat_template),
        as_chat=wish.as_chat,
        last_turn=wish.last_turn,
    )
    for prompt, where in itertools.islice(_prompts(config, wish, reading, read.left_out), wish.limit):
        read.prompts.append(prompt)
        read.wheres.append(where)
    if not read.prompts:
        first = f", the first at {read.left_out[0].where()}: {read.left_out[0].reason}" if read.left_out else ""
        raise InputError(f"data.paths = {', '.join(config.data.paths)} holds no prompt{first}; give other files")
    # Both raise before a model is loaded.
    if any(prompt.is_own for prompt in read.prompts):
        ChatTemplate(tokenizer, given).user_turn()
    elif any(prompt.turns for prompt in read.prompts):
        ChatTemplate(tokenizer, given).source()


def _prompts(
    config: Config, wish: Wish, reading: PromptFormat, left_out: list[LeftOut]
) -> Iterator[tuple[Prompt, Where]]:
    for number, text in enumerate(shipped_prompts(wish.num_shipped), 1):
        yield Prompt(turns=([{"role": "user", "content": text}],)), partial("shipped prompt {}".format, number)
    for number in range(1, wish.num_own + 1):
        yield Prompt(is_own=True), partial("own prompt {}".format, number)
    with tempfile.TemporaryDirectory() as folder:
        paths = copied(config.data.paths, Path(folder))
        corpora = find_corpora(paths, "data.paths", reading.text_key) if paths else []
        for corpus in corpora:
            if corpus.weight is not None or corpus.prefixes:
                raise InputError(
                    f"regenerate takes files of prompts, without weights and not tokenized, got {corpus.name}; leave weights "
                    "out, and give texts in place of .bin and .idx"
                )
            print_passed_over(corpus.passed_over)
        files = [path for corpus in corpora for path in corpus.texts]
        records = (record for piece in file_ranges(files) for record in read_records(piece, reading.text_key))
        for number, (record, where) in enumerate(records, 1):
            if has_pipes(config.data.paths):  # the copies are gone when an error is to name a line
                where = partial("record {}".format, number)
            found = prompt_of(record, reading, where)
            if isinstance(found, LeftOut):
                left_out.append(LeftOut(found.reason, where))
            else:
                yield found, where


def _settings(llm: EarlyExitLLM, config: Config, wish: Wish, params: SamplingParams, read: _Prompts) -> Settings:
    """Returns everything that the output depends on."""
    is_chat = any(prompt.turns or prompt.is_own for prompt in read.prompts)
    template = ChatTemplate(llm.tokenizer, read_chat_template(config.data.chat_template)).source() if is_chat else ""
    return {
        **model_settings(llm, config),
        **{name: value for name, value in dataclasses.asdict(params).items() if name != "logprobs"},
        "chat template": hashlib.sha256(template.encode()).hexdigest()[:16],
        "--drop-cut": wish.drops_cut,
        "prompts": read.digest(),
    }


def _answer(
    llm: EarlyExitLLM, config: Config, wish: Wish, options: GenerationSection, read: _Prompts, output: OutputFile | None
) -> None:
    """Generates the answers that `output` lacks, and finishes it. Only rank 0 has `output`."""
    done = output.done if output is not None else frozenset[Key]()
    num_all = len(read.prompts) * options.n
    if done:
        say(f"{len(done)} of {num_all} answers are in {wish.output}.partial already")
    coming = (
        Dialogue(prompt, place, index)
        for place, prompt in enumerate(read.prompts)
        for index in range(options.n)
        if (place, index) not in done
    )
    is_long = any(prompt.num_answers > 1 for prompt in read.prompts)
    template = ChatTemplate(llm.tokenizer, read_chat_template(config.data.chat_template))
    dialogues = Dialogues(
        coming,
        template,
        at_a_time=llm.model.topology.dp
        * options.max_batch_size
        * (_BATCHES_OF_LONG if is_long else _BATCHES_AT_A_TIME),
        drops_cut=wish.drops_cut,
        wheres=read.wheres,
    )
    for record in read.left_out:
        dialogues.leave_out(*record)
    with closed_at_the_end(output, num_all):
        params = QuestionParams.of(llm, options, template, has_own=bool(wish.num_own))
        _decode(llm, options, dialogues, params, output, CompletionProgress(num_all, len(done)))
        on_first_rank(llm.model.topology, lambda: _finish(wish, dialogues, output, len(done)))


def _decode(
    llm: EarlyExitLLM,
    options: GenerationSection,
    dialogues: Dialogues,
    params: QuestionParams,
    output: OutputFile | None,
    progress: CompletionProgress,
) -> None:
    def write_ended() -> None:
        if output is None:
            return
        for record in dialogues.ended():
            if record is not None:
                output.write(record)
            progress.completion()

    def take(number: int, completion: Completion) -> None:
        dialogues.take(number, completion)
        write_ended()

    while questions := on_first_rank(llm.model.topology, dialogues.next_round):
        decode_shared(llm, [params.job(each) for each in questions], options, take, progress.tokens)
        write_ended()
    write_ended()


def _finish(wish: Wish, dialogues: Dialogues, output: OutputFile | None, num_done: int) -> None:
    tally = dialogues.tally
    if output is None:
        return
    if not output.done:
        raise InputError(
            f"no prompt could be answered, and {wish.output} is not written; {tally.left_out} are left out, the first is "
            f"{tally.first_reason}"
        )
    output.finish()
    notes = [
        f"last answer cut at max_new_tokens or the end of the context, where tune learns no end: {tally.cut:,}"
        if tally.cut
        else "",
        f"without their later turns: {tally.shortened:,}" if tally.shortened else "",
        f"prompts left out: {tally.left_out:,}" if tally.left_out else "",
    ]
    say("; ".join([f"wrote {wish.output}, records: {tally.answered + num_done:,}", *filter(None, notes)]))
