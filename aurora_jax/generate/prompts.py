"""Prompts of the three kinds that StarCoder's family knows: text to go on with, code to fill in, an
instruction to answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aurora_jax.data.text.documents import INSTRUCTION, RESPONSE
from aurora_jax.data.text.tokenizer import Tokenizer
from aurora_jax.errors import InputError

FILL_IN_THE_MIDDLE = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
)
"""Special tokens of StarCoder, and of SantaCoder."""

NAMES = ("prompt", "prefix", "suffix", "instruction")
"""Fields of records that prompts are made of."""

FIELDS = "prompt | prefix + suffix | instruction"


@dataclass(frozen=True)
class Prompt:
    """What a model is given.

    Attributes:
        tokens: its ids.
        context: those of the text that the completion goes on behind (`streaming.TextStream`).
    """

    tokens: list[int]
    context: list[int]


def continuation(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text as it is; names of special tokens in it are ordinary text. Raises InputError if it is empty."""
    if not text:
        raise InputError("The prompt is empty: a model continues text, give it at least one character.")
    tokens = tokenizer.encode(_whole(text))
    return Prompt(tokens, tokens)


def infilling(tokenizer: Tokenizer, prefix: str, suffix: str) -> Prompt:
    """What stands before and after a gap, in the order prefix, suffix, middle (Bavarian et al. 2022, arXiv
    2207.14255, PSM mode).

    Encoded as the pieces of a document are in training; prefix, completion and suffix put together are the text.

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
        # Without a prefix it is the completion that begins the text.
        pieces = tokenizer.encode_pieces([_whole(prefix), _whole(suffix)], begins=bool(prefix))
        prefix_ids, suffix_ids = (piece.tolist() for piece in pieces)
        return Prompt([before, *prefix_ids, after, *suffix_ids, middle], prefix_ids)
    raise InputError(
        f"{tokenizer.path}: the tokenizer has no fill-in-the-middle tokens "
        f"({', '.join(FILL_IN_THE_MIDDLE[0])}): this model cannot infill."
    )


def instruction(tokenizer: Tokenizer, text: str) -> Prompt:
    """An instruction in Aurora-M's template, up to where the response begins. Raises InputError if it is empty."""
    if not text.strip():
        raise InputError("The instruction is empty.")
    tokens = tokenizer.encode(f"{INSTRUCTION}{_whole(text).strip()}{RESPONSE}")
    return Prompt(tokens, tokens)


def of_record(tokenizer: Tokenizer, record: Mapping[str, Any]) -> Prompt:
    """The prompt of a JSON object with `prompt`, or `prefix` and `suffix`, or `instruction`. Raises
    InputError unless it has just one."""
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


_ESCAPE = re.compile(r"\\(?:([nrt\\])|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.?))", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def stop_string(written: str) -> str:
    r"""A stop string as it is typed in a shell: \n, \r, \t, \xHH, \uHHHH, \UHHHHHHHH (by number), and \\ for
    a backslash.

    Raises:
        InputError: another escape, a number that is no character, or nothing.
    """

    def character(found: re.Match[str]) -> str:
        letter, *numbers, other = found.groups()
        if letter:
            return _ESCAPED[letter]
        number = next((int(digits, 16) for digits in numbers if digits), None)
        if number is None:
            raise InputError(
                f"--stop {written!r}: \\{other} is no escape; those are \\n, \\r, \\t, \\xHH, \\uHHHH, \\UHHHHHHHH, "
                "and \\\\ for a backslash."
            )
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            raise InputError(f"--stop {written!r}: {found[0]} is no character.")
        return chr(number)

    if not written:
        raise InputError("A stop string is empty.")
    return _ESCAPE.sub(character, _whole(written))


def _whole(text: str) -> str:
    """The text. Raises InputError for halves of characters: a command's bytes that are no UTF-8, JSON's lone
    surrogates."""
    wrong = re.search("[\ud800-\udfff]", text)
    if wrong is not None:
        raise InputError(
            f"Character {wrong.start() + 1} of {text[:80]!r} is none: the text must be UTF-8, without half a "
            "surrogate pair."
        )
    return text
