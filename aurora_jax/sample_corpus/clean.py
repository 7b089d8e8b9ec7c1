"""Cleaning of lines, the language check, duplicates, and the choice of the cleaner subset."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

from aurora_jax.languages import LETTERS, NATURAL

_TAG = re.compile(r"</?[A-Za-z!][^<>]*>")
_PRODUCT = (("%PRODUCTNAME", "LibreOffice"), ("%PRODUCTVERSION", "7"), ("%PRODUCTEXTENSION", ""))
# What programs fill in at run time: %s, %1$d, %(name)s, {name}, { $name }, ${name}, $1, $(ARG1), #1.
_PLACEHOLDER = re.compile(
    r"%\([\w-]+\)[a-z]|%\d*\$?-?\d*\.?\d*(?:[sduifgxc]|l[ud])(?![A-Za-z])|[$%#]?\{[^{}]*\}|\$\(\w+\)|[$#]\d+|%[A-Z_]{3,}|%\d+(?![\d%])"
)
_ACCELERATOR_IN_BRACKETS = re.compile(r"\s*[(（][_&~][A-Za-z0-9][)）]")
_ACCELERATOR = re.compile(r"[&~](?=\w)|(?<![\w_])_(?=[^\W_])|(?<=[^\W_])_(?=[^\W\d_])")
_INVISIBLE = re.compile(
    "[\u00ad\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufffd\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"[^\W\d_]+")

_DEVANAGARI = re.compile(f"[{LETTERS['Deva']}]")
_JAPANESE = re.compile(f"[{LETTERS['Jpan']}]")
_VIETNAMESE = re.compile("[ăâđêôơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹàáãèéìíòóõùúýĩũ]", re.IGNORECASE)
_BEYOND_LATIN = re.compile("[\u0370-\u1dff\u2e80-\uffdc]")
_ENGLISH_WORDS = frozenset(
    (
        *(
            "the",
            "of",
            "and",
            "to",
            "in",
            "is",
            "for",
            "with",
            "that",
            "this",
            "are",
            "be",
            "you",
            "or",
            "on",
            "from",
            "as",
            "by",
            "it",
        ),
        *("an", "a", "can", "not", "will", "your", "which", "if"),
    )
)

# Shorter lines say too little for the identifier of languages.
_IDENTIFIABLE_LENGTH = 40
_SENTENCE_END = (".", "!", "?", "。", "！", "？", "।", ":", "．")


def clean_line(text: str, *, message: bool = False) -> str:
    """One line of plain text: no markup, no invisible characters, single spaces, NFC; a placeholder becomes "…".

    Args:
      text: a raw line, which may hold line breaks.
      message: the line is a message of a user interface, whose accelerator marks (_File, &File, ~File) are dropped.
    """
    text = html.unescape(_TAG.sub("", text))
    for name, value in _PRODUCT:
        text = text.replace(name, value)
    text = text.replace("\\n", " ").replace('\\"', '"')
    if message:
        text = _ACCELERATOR_IN_BRACKETS.sub("", text)
        # More than one mark is an identifier (MAX_FILE_SIZE), not an accelerator.
        if len(_ACCELERATOR.findall(text)) == 1:
            text = _ACCELERATOR.sub("", text)
    text = _PLACEHOLDER.sub("…", text)
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", _SPACE.sub(" ", text)))
    return _SPACE.sub(" ", text).strip()


def fingerprint(line: str) -> str:
    """What two lines share if they say the same: case, width of characters, spacing and closing punctuation
    do not count."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", line).casefold()).strip(" .:;,!?…。、！？।")


def is_language(line: str, language: str) -> bool:
    """Whether a clean line is running text of `language` (en, fi, hi, ja, vi).

    By script for Hindi and Japanese; by letters and, from 40 characters on, by a statistical identifier for
    the Latin scripts.
    """
    if "/" in line and " " not in line:  # names of time zones and paths
        return False
    letters = sum(map(len, _WORD.findall(line)))
    marks = len(line) - line.count(" ")
    if language == "hi":
        devanagari = len(_DEVANAGARI.findall(line))
        return devanagari >= 6 and devanagari >= 0.5 * marks
    if language == "ja":
        japanese = len(_JAPANESE.findall(line))
        return japanese >= 4 and japanese >= 0.4 * marks
    if letters < 6 or letters < 0.6 * marks or _BEYOND_LATIN.search(line):
        return False
    if language == "vi":
        return _is_vietnamese(line)
    if language == "fi" and _english_share(line) >= 0.15:
        return False
    return len(line) < _IDENTIFIABLE_LENGTH or identify(line) == language


def _is_vietnamese(line: str) -> bool:
    return len(_VIETNAMESE.findall(line)) >= 0.2 * len(_WORD.findall(line)) and _english_share(line) < 0.15


def _english_share(line: str) -> float:
    words = _WORD.findall(line.lower())
    return sum(word in _ENGLISH_WORDS for word in words) / max(len(words), 1)


def identify(text: str) -> str:
    """The most likely one of our five languages."""
    from aurora_jax.data.text.identification import identifier

    return identifier(tuple(NATURAL)).classify(text)[0]


class Deduplicator:
    """Lets each line of one language pass once, by `fingerprint`, and those in `barred` never."""

    def __init__(self, barred: Iterable[str] = ()) -> None:
        self._seen = {fingerprint(line) for line in barred}

    def new(self, lines: Iterable[str]) -> list[str]:
        """The lines that were not met before, in order."""
        kept = []
        for line in lines:
            key = fingerprint(line)
            if key not in self._seen:
                self._seen.add(key)
                kept.append(line)
        return kept


def prose(lines: Iterable[str], language: str) -> list[str]:
    """The whole sentences among clean lines: long enough, closed by punctuation, with few symbols and digits,
    without placeholders."""
    minimum = {"ja": 30, "hi": 45}.get(language, 60)
    symbols = 0.10 if language == "ja" else 0.06
    whole = (line for line in lines if len(line) >= minimum and line.endswith(_SENTENCE_END) and "…" not in line)
    return [line for line in whole if _symbol_share(line) <= symbols]


def _symbol_share(line: str) -> float:
    ordinary = sum(unicodedata.category(character)[0] in "LMZ" for character in line)
    return 1 - ordinary / len(line)
