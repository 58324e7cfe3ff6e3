"""The message with a stage's decisions of one step, for all ranks: one for each stage and step.

The number of its float64 values follows from the plan, which every rank has.
"""

from collections.abc import Iterator

from ee_tuning.engine.step_plan import Answer, ExitAnswer, RowOutput, RowPlan


def message_size(rows: list[RowPlan], numbers: range) -> int:
    """Returns the number of values in a stage's message; 0 where no head of its segments `numbers` is asked."""
    return sum([_row_size(row, numbers) for row in rows])


def pack(rows: list[RowPlan], numbers: range, outputs: list[RowOutput]) -> list[float]:
    """Returns a stage's message: for each row its exit segment, answers, and the answers of exits that may draft."""
    values = list[float]()
    for row, output in zip(rows, outputs, strict=True):
        if not (size := _row_size(row, numbers)):
            continue
        first, num_top = len(values), row.sequence.params.logprobs
        values += [output.segment, len(output.answers), len(output.asked)]
        for answer in output.answers:
            values += [answer.token_id, answer.confidence]
            if num_top is not None:
                values += [answer.logprob or 0.0, *(answer.top_logprobs or {}), *(answer.top_logprobs or {}).values()]
        for each in output.asked:
            values += each
        values += [0.0] * (size - (len(values) - first))
    return values


def unpack(rows: list[RowPlan], numbers: range, values: list[float]) -> list[RowOutput]:
    """Returns the outputs of a stage from its message."""
    outputs, first = list[RowOutput](), 0
    for row in rows:
        size = _row_size(row, numbers)
        outputs.append(_unpacked(row, iter(values[first : first + size])) if size else RowOutput())
        first += size
    return outputs


def _unpacked(row: RowPlan, values: Iterator[float]) -> RowOutput:
    segment, num_answers, num_asked = (int(next(values)) for _ in range(3))
    answers, num_top = list[Answer](), row.sequence.params.logprobs
    for _ in range(num_answers):
        token, confidence = int(next(values)), next(values)
        if num_top is None:
            answers.append(Answer(confidence, token))
            continue
        logprob, ids = next(values), [int(next(values)) for _ in range(num_top)]
        answers.append(Answer(confidence, token, logprob, dict(zip(ids, [next(values) for _ in ids], strict=True))))
    asked = [ExitAnswer(int(next(values)), int(next(values)), next(values)) for _ in range(num_asked)]
    return RowOutput(segment, answers, asked)


def _row_size(row: RowPlan, numbers: range) -> int:
    """Returns the number of values for a row; 0 where none of its heads in these segments is asked."""
    asked = [number for number in numbers if number <= row.last_segment and row.is_asked(number)]
    if not asked:
        return 0
    num_answers = row.num_asked if row.last_segment in asked else 1
    num_top = row.sequence.params.logprobs
    answer_size = 2 if num_top is None else 3 + 2 * num_top
    return 3 + num_answers * answer_size + 3 * len(asked)
