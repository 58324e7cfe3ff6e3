"""The required form of a completion. Names and meanings are those of vLLM's `structured_outputs`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ee_tuning.errors import InputError
from ee_tuning.json_file import parse_strict_json, to_json

MOST_CHARACTERS = 1 << 20
"""Most characters of a schema, expression or grammar. Larger ones would take minutes to compile."""
WHITE_SPACE = r" |\n {0,24}"
"""White space between the tokens of JSON: enough to indent, bounded so that it ends."""


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """A JSON schema, any JSON object, a regular expression, a choice of texts, or a grammar. Raises InputError unless
    exactly one is given, and on values of a wrong type.
    """

    json: str | Mapping[str, Any] | None = None
    """JSON that satisfies this schema, given as an object or as its text."""
    json_object: bool | None = None
    """Whether any JSON object is allowed."""
    regex: str | None = None
    """A text that the expression matches as a whole (Rust's syntax, without look-around)."""
    choice: tuple[str, ...] | None = None
    """The allowed texts."""
    grammar: str | None = None
    """A text of the language of a grammar: llguidance's variant of Lark, or GBNF."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None and value is not False}
        if len(given) != 1:
            raise InputError(
                f"structured_output must have one of {', '.join(_NAMES)}, got {' and '.join(given) or 'none'}; give one"
            )
        ((name, value),) = given.items()
        if name == "choice":
            if isinstance(value, str) or not all(isinstance(text, str) and text for text in value) or not value:
                raise InputError(f"choice must be a list of texts that are not empty, got {value!r:.80}; mend it")
            object.__setattr__(self, "choice", tuple(value))
        elif name == "json":
            object.__setattr__(self, "json", _schema_text(value))
        elif name == "json_object":
            if value is not True:
                raise InputError(f"json_object must be true or false, got {value!r:.80}; mend it")
        elif not isinstance(value, str) or not value:
            raise InputError(f"{name} must be a text that is not empty, got {value!r:.80}; mend it")
        if len(str(getattr(self, name))) > MOST_CHARACTERS:
            raise InputError(f"{name} must have at most {MOST_CHARACTERS} characters, got more; simplify it")

    @property
    def name(self) -> str:
        """Name of the given field."""
        return next(name for name in _NAMES if getattr(self, name) not in (None, False))

    @property
    def schema(self) -> str:
        """The JSON schema as llguidance takes it; only where `name` is json or json_object."""
        return bounded_schema(parse_strict_json(self.json) if isinstance(self.json, str) else {"type": "object"})


_NAMES = tuple(field.name for field in dataclasses.fields(StructuredOutput))


def bounded_schema(schema: Mapping[str, Any] | bool) -> str:
    """Returns the text of a schema that bounds white space, unless the schema sets it itself (`x-guidance`:
    https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md).
    """
    if isinstance(schema, bool):
        return to_json(schema)
    own = schema.get("x-guidance", {})
    options = {"whitespace_pattern": WHITE_SPACE, **own} if isinstance(own, Mapping) else own
    return to_json({**schema, "x-guidance": options}, ensure_ascii=False)


def structured_output_of(given: Any) -> StructuredOutput | None:
    """Returns the form that an object with the fields' names describes; None where none is given. Raises InputError on
    other names.
    """
    if given is None or isinstance(given, StructuredOutput):
        return given
    if not isinstance(given, Mapping):
        raise InputError(
            f"structured_output must be an object with one of {', '.join(_NAMES)}, got {given!r:.80}; mend it"
        )
    if unknown := [name for name in given if name not in _NAMES]:
        raise InputError(f"structured_output has one of {', '.join(_NAMES)}, got {unknown[0]!r:.80}; mend it")
    return StructuredOutput(**given)


def _schema_text(schema: Any) -> str:
    """Returns the schema as one text, so that equal schemas are compiled once. The order of properties is kept, since
    the answer has it, too.
    """
    if isinstance(schema, str):
        try:
            schema = parse_strict_json(schema)
        except (ValueError, RecursionError) as error:
            raise InputError(f"json must be a JSON schema, got {schema!r:.60}: {error}"[:300] + "; mend it") from error
    if not isinstance(schema, Mapping | bool):
        raise InputError(f"json must be a JSON schema, an object, got {schema!r:.80}; mend it")
    try:
        return to_json(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"json must be a JSON schema, got one that is no JSON: {error}"[:300] + "; mend it") from error
