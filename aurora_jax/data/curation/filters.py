"""Filters that look at one document at a time: is it in its language, and does it measure like text.

Legend: U units of a text, G n-grams of units.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import regex

from aurora_jax.data.curation.thresholds import Thresholds
from aurora_jax.data.curation.units import hash_characters, hash_ngrams, is_unspaced
from aurora_jax.languages import CODE

LANGUAGE = "language"
CHARACTER_REPETITION_LENGTH = 10

# Of a long document the beginning, the middle and the end are identified, each of so many characters.
_EXCERPT = 500
# From this share of lines on, a text is code before it is any language.
_CODE_SHARE = 0.6

_SPECIAL = regex.compile(r"[^\p{L}\p{M}\s]")
# A line of code, by what prose does not do: ends in a semicolon or an open bracket, holds only brackets,
# opens with a keyword and its syntax, a comment, a tag or an entry of a table, assigns, compares or calls.
_CODE_LINE = re.compile(
    r"""
      [;{}\[(]\s*$
    | ^\s*[\])}]+[;,:)]*\s*$
    | ^\s*(?:def|class|import|from\s+\S+\s+import|return|function|const|var|let|public|private|static|export|async)\b(?!\s+\w+\s+\w+\s)
    | ^\s*(?:if|for|while|with)\b.*[:{(]\s*$
    | ^\s*(?:else|elif|try|except|finally)\b.*[:{]\s*$
    | ^\s*(?:\#\s|\#!|\#$|//|/\*|\*\s|\*/|@\w|</?\w|<!--|\$\s|\"{3}|'{3})
    | ^\s*["']?[\w.$-]+["']?\s*:\s*\S.*,\s*$
    | ^\s*(?:[\w.$]|\[[^\]]*\]|,\s)+(?:\s*:\s*[\w.\[\], |]+)?\s*[-+*/%|&^]?=\s*\S
    | \S\s*(?:==|!=|<=|>=|=>|->|::|&&|\|\|)\s*\S
    | [\w\])]\([^)]*\)\s*[:;,.)]?\s*$
    | \w\.\w+\(
    | ^\s*["'].*["'],?\s*$
    """,
    re.VERBOSE,
)
_LETTER = regex.compile(r"\p{L}")


def identify(text: str) -> tuple[str, float]:
    """The language of a text and its probability: "code" with the share of lines that look like it, or that
    of one of 142 languages."""
    share = code_share(text)
    if share >= _CODE_SHARE and _is_mostly_ascii(text):
        return CODE, share
    from aurora_jax.data.text.identification import identifier

    language, probability = identifier(probabilities=True).classify(_excerpts(text))
    return str(language), float(probability)


def _is_mostly_ascii(text: str) -> bool:
    """Whether most letters are ASCII, as in code whatever language its comments are in; a list of formulas in
    Hindi is Hindi."""
    letters = _LETTER.findall(text)
    return sum(letter.isascii() for letter in letters) >= len(letters) / 2


def code_share(text: str) -> float:
    """The share of lines, blank ones aside, that look like code."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(_CODE_LINE.search(line) is not None for line in lines) / max(len(lines), 1)


def language_rejection(text: str, language: str, thresholds: Thresholds) -> str | None:
    """Why a document is not in its language, or None if it is."""
    if language == CODE:
        share = code_share(text)
        return None if share >= thresholds.language_probability else f"only {share:.2f} of the lines look like code"
    found, probability = identify(text)
    if found == language and probability >= thresholds.language_probability:
        return None
    return f"identified as {found} ({probability:.2f})"


def _excerpts(text: str) -> str:
    if len(text) <= 3 * _EXCERPT:
        return text
    middle = len(text) // 2
    return " ".join((text[:_EXCERPT], text[middle : middle + _EXCERPT], text[-_EXCERPT:]))


@dataclass(frozen=True)
class Metrics:
    """What the heuristics measure in one document; see `Thresholds` for each."""

    words: float
    character_repetition: float
    word_repetition: float
    special_characters: float
    stop_words: float
    flagged_words: float
    mean_line_length: float
    short_lines: float

    def rejections(self, thresholds: Thresholds) -> Iterator[tuple[str, str]]:
        """(filter, why) for each limit that the document breaks."""
        least_stop_words = thresholds.minimum_stop_words if self.words >= thresholds.stop_words_from else 0.0
        limits = (
            ("words", thresholds.minimum_words, math.inf),
            ("character_repetition", 0.0, thresholds.maximum_character_repetition),
            ("word_repetition", 0.0, thresholds.maximum_word_repetition),
            ("special_characters", 0.0, thresholds.maximum_special_characters),
            ("stop_words", least_stop_words, 1.0),
            ("flagged_words", 0.0, thresholds.maximum_flagged_words),
            ("mean_line_length", thresholds.minimum_mean_line_length, thresholds.maximum_mean_line_length),
            ("short_lines", 0.0, thresholds.maximum_short_lines),
        )
        for name, least, most in limits:
            value = getattr(self, name)
            if value < least:
                yield name, f"{value:.4g} is under {least:.4g}"
            elif value > most:
                yield name, f"{value:.4g} is over {most:.4g}"


def measure(
    text: str,
    units: list[str],
    unit_U: np.ndarray,
    language: str,
    thresholds: Thresholds,
    word_list: Collection[str] = (),
) -> Metrics:
    """The metrics of a document.

    Args:
      text: as it came.
      units, unit_U: `split_units` of its normalized text, and their hashes.
      language: whose stop words count.
      thresholds: for the lengths at which repetition and short lines are measured.
      word_list: flagged words and phrases, normalized; the units of a phrase are joined by single spaces.
    """
    stop_words = _stop_words(language)
    lengths = [len(line.strip()) for line in text.splitlines() if line.strip()]
    return Metrics(
        words=len(units),
        character_repetition=_frequent_share(hash_ngrams(hash_characters(text), CHARACTER_REPETITION_LENGTH)),
        word_repetition=_repeated_share(hash_ngrams(unit_U, thresholds.word_repetition_length)),
        special_characters=len(_SPECIAL.findall(text)) / max(len(text), 1),
        stop_words=sum(unit in stop_words for unit in units) / max(len(units), 1),
        flagged_words=_flagged(units, word_list) / max(len(units), 1),
        mean_line_length=sum(lengths) / max(len(lengths), 1),
        short_lines=sum(length < thresholds.short_line for length in lengths) / max(len(lengths), 1),
    )


def _frequent_share(hash_G: np.ndarray) -> float:
    """ROOTS's repetition of characters: the share of the sqrt(n) most frequent of n n-grams, those that occur
    once left out."""
    _, counts = np.unique(hash_G, return_counts=True)
    repeated = np.sort(counts[counts > 1])[::-1]
    return float(repeated[: math.isqrt(len(counts))].sum() / max(len(hash_G), 1))


def _repeated_share(hash_G: np.ndarray) -> float:
    _, counts = np.unique(hash_G, return_counts=True)
    return float(counts[counts > 1].sum() / max(len(hash_G), 1))


def _flagged(units: list[str], word_list: Collection[str]) -> int:
    """How many units stand in a flagged word or phrase."""
    if not word_list:
        return 0
    longest = max(phrase.count(" ") for phrase in word_list) + 1
    flagged: set[int] = set()
    for length in range(1, longest + 1):
        for start in range(len(units) - length + 1):
            if " ".join(units[start : start + length]) in word_list:
                flagged.update(range(start, start + length))
    return len(flagged)


@functools.cache
def _stop_words(language: str) -> frozenset[str]:
    """Stop words of a language, none if the list has no such language. Of scripts without spaces those of one
    character count."""
    import stopwordsiso

    words = stopwordsiso.stopwords(language) if stopwordsiso.has_lang(language) else ()
    return frozenset(word for word in words if len(word) == 1 or not is_unspaced(word))
