"""Prompts of the three kinds that StarCoder's family knows: text to go on with, code to fill in, an instruction to answer."""

from collections.abc import Mapping
from typing import Any

from aurora_jax.data.documents import INSTRUCTION, RESPONSE
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import InputError

FILL_IN_THE_MIDDLE = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)
"""Special tokens of StarCoder, and of SantaCoder."""

NAMES = ("prompt", "prefix", "suffix", "instruction")
"""Fields of records that prompts are made of."""

FIELDS = "prompt | prefix + suffix | instruction"


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as it is; names of special tokens in it are ordinary text. Raises InputError if it is empty."""
    if not text:
        raise InputError("The prompt is empty: a model continues text, give it at least one character.")
    return tokenizer.encode(text)


def infilling(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """What stands before and after a gap, in the order prefix, suffix, middle (Bavarian et al. 2022, arXiv 2207.14255, PSM mode).

    Raises:
        InputError: both are empty, or the tokenizer has no fill-in-the-middle tokens.
    """
    if not prefix and not suffix:
        raise InputError("Prefix and suffix are both empty: there is nothing to fill in between.")
    for names in FILL_IN_THE_MIDDLE:
        try:
            before, after, middle = map(tokenizer.special_id, names)
        except InputError:
            continue
        return [before, *tokenizer.encode(prefix), after, *tokenizer.encode(suffix), middle]
    raise InputError(
        f"{tokenizer.path}: the tokenizer has no fill-in-the-middle tokens ({', '.join(FILL_IN_THE_MIDDLE[0])}): this model cannot infill."
    )


def instruction(tokenizer: Tokenizer, text: str) -> list[int]:
    """An instruction in Aurora-M's template, up to where the response begins. Raises InputError if it is empty."""
    if not text.strip():
        raise InputError("The instruction is empty.")
    return tokenizer.encode(f"{INSTRUCTION}{text.strip()}{RESPONSE}")


def of_record(tokenizer: Tokenizer, record: Mapping[str, Any]) -> list[int]:
    """The prompt of a JSON object with `prompt`, or `prefix` and `suffix`, or `instruction`. Raises InputError unless it has just one."""
    fields = {name: record.get(name) for name in NAMES if name in record}
    wrong = next((name for name, value in fields.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise InputError(f"its {wrong!r} is no string.")
    match sorted(fields):
        case ["prompt"]:
            return continuation(tokenizer, fields["prompt"])  # type: ignore[arg-type]
        case ["instruction"]:
            return instruction(tokenizer, fields["instruction"])  # type: ignore[arg-type]
        case ["prefix"] | ["suffix"] | ["prefix", "suffix"]:
            return infilling(tokenizer, record.get("prefix", ""), record.get("suffix", ""))
    raise InputError(f"one of {FIELDS} is expected, found {', '.join(map(repr, record)) or 'nothing'}.")
