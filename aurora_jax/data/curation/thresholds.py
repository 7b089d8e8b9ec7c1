"""The limits of the document filters, one row a language, and how a user changes a row or adds one.

The metrics are those of ROOTS (Laurençon et al., 2022) and CulturaX (Nguyen et al., 2023, section 2.3). ROOTS
publishes its limits for en, hi and vi (bigscience-workshop/data-preparation, parameters_filtering.py); they
were set for web pages and are quoted beside ours. Like CulturaX we then look at the percentiles of each
metric: no limit removes more than about 1 % of a clean corpus of short documents (the sample corpus), because
what such a corpus has is text, however terse. `report.json` of every run holds the percentiles of its own
input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aurora_jax.errors import InputError
from aurora_jax.languages import CODE
from aurora_jax.storage.records import object_in


@dataclass(frozen=True)
class Thresholds:
    """What a document of one language must measure. Ratios lie between 0 and 1; words are characters where no
    spaces are written.

    Attributes:
      language_probability: least probability that the identifier gives the language (for code: least share of
          lines that look like code).
      minimum_words: fewest words.
      maximum_character_repetition: share of the most frequent 10-grams of characters (as many of them as the
          root of their number).
      word_repetition_length: length of the n-grams of words of the next line.
      maximum_word_repetition: share of the n-grams of words that occur more than once.
      maximum_special_characters: share of characters that are neither letters, marks nor white space.
      minimum_stop_words: share of words that are stop words, looked at from `stop_words_from` words on.
      stop_words_from: in shorter documents the share of stop words is chance.
      maximum_flagged_words: share of words that the user's word list flags.
      minimum_mean_line_length, maximum_mean_line_length: characters of a line that is not blank.
      short_line: a line with fewer characters is short.
      maximum_short_lines: share of the lines that are short.
    """

    language_probability: float = 0.5
    minimum_words: int = 10  # ROOTS's default
    maximum_character_repetition: float = 0.25  # ROOTS's default is 0.2; its en 0.106, hi 0.18, vi 0.15, for long pages
    word_repetition_length: int = 5
    maximum_word_repetition: float = 0.45
    maximum_special_characters: float = 0.3  # ROOTS: 0.25 to 0.45, white space counted
    minimum_stop_words: float = 0.0
    stop_words_from: int = 50
    maximum_flagged_words: float = 0.01  # ROOTS: en 0.01, hi and vi 0.005
    minimum_mean_line_length: float = 10.0
    maximum_mean_line_length: float = float("inf")
    short_line: int = 20
    maximum_short_lines: float = 0.95


THRESHOLDS: Mapping[str, Thresholds] = {
    # ROOTS: 20 words, word repetition 0.19, stop words 0.3 (of a list of closed classes).
    "en": Thresholds(minimum_stop_words=0.15),
    # Inflection does the work of function words: ROOTS's Basque, alike in this, has 8 words, repetition 0.40,
    # stop words 0.05.
    "fi": Thresholds(minimum_words=7, minimum_stop_words=0.03),
    # ROOTS: 38 words, word repetition 0.47, stop words 0.01. Devanagari's vowel signs are characters, so
    # lines count longer than they look.
    "hi": Thresholds(
        language_probability=0.4,  # Marathi and Nepali share the script and most of the words of short messages
        maximum_word_repetition=0.47,
        minimum_stop_words=0.05,
        maximum_flagged_words=0.005,
        minimum_mean_line_length=8.0,
        short_line=10,
        maximum_short_lines=0.8,
    ),
    # Characters, not words: about two make a word, so lengths double and lines are half as long. Stop words
    # are particles of one character.
    "ja": Thresholds(
        minimum_words=25,
        word_repetition_length=10,
        maximum_word_repetition=0.55,
        minimum_stop_words=0.08,
        stop_words_from=100,
        maximum_flagged_words=0.005,
        minimum_mean_line_length=6.0,
        short_line=10,
        maximum_short_lines=0.85,
    ),
    # Words are syllables. ROOTS: 30 words, word repetition 0.20, stop words 0.08 with pairs of syllables.
    "vi": Thresholds(
        minimum_words=15, maximum_word_repetition=0.55, minimum_stop_words=0.12, maximum_flagged_words=0.005
    ),
    # The Stack and StarCoder (Li et al., 2023): mean line length at most 100, which drops minified and generated files.
    CODE: Thresholds(
        language_probability=0.2,
        minimum_words=20,
        maximum_character_repetition=0.35,
        maximum_word_repetition=0.6,
        maximum_special_characters=0.5,
        maximum_mean_line_length=100.0,
        short_line=5,
    ),
}


def load_thresholds(path: Path | None) -> dict[str, Thresholds]:
    """The table, changed by a JSON file {language: {field: number}}; a language that has no row starts from
    the defaults.

    Raises:
      InputError: the file is no such JSON, or names a field that there is not.
    """
    rows = dict(THRESHOLDS)
    if path is None:
        return rows
    try:
        changes = object_in(path.read_bytes(), path)
        for language, fields in changes.items():
            unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(Thresholds)})
            if unknown:
                raise InputError(
                    f"{path}: {language}: there is no threshold {unknown[0]!r}; there are {', '.join(_names())}."
                )
            wrong = [
                name for name, value in fields.items() if isinstance(value, bool) or not isinstance(value, (int, float))
            ]
            if wrong:
                raise InputError(f"{path}: {language}: {wrong[0]} must be a number, not {fields[wrong[0]]!r}.")
            rows[language] = dataclasses.replace(rows.get(language, Thresholds()), **fields)
    except OSError as error:
        raise InputError(f"{path}: the thresholds cannot be read ({error.strerror}).") from None
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f'{path}: not a JSON object such as {{"en": {{"minimum_words": 20}}}} ({error}).') from None
    return rows


def _names() -> list[str]:
    return [field.name for field in dataclasses.fields(Thresholds)]
