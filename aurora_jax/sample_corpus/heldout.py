"""The held-out text: the same messages in every language, in the same order.

Because the content is equal, losses per message (and bits) compare across languages, which bits per byte of
unlike texts do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from aurora_jax.languages import NATURAL
from aurora_jax.sample_corpus.clean import clean_line, fingerprint, is_language
from aurora_jax.sample_corpus.code import HELD_OUT_MODULUS
from aurora_jax.sample_corpus.extract import MESSAGES_PER_DOCUMENT

RULE = (
    f"Natural language: messages of one package that exist in all of {', '.join(NATURAL)}, are whole clean "
    "text of the language in each, "
    f"and differ between languages; {MESSAGES_PER_DOCUMENT} consecutive ones are a document; documents are "
    "taken in the order of the "
    "SHA-256 of their English text until English reaches the limit. No training line has the fingerprint "
    "(case, spacing, closing "
    "punctuation) of a held-out line. "
    f"Code: Python files whose path has a SHA-256 of 0 modulo {HELD_OUT_MODULUS}; no training file equals one of them."
)

_MINIMUM_ENGLISH_CHARACTERS = 25
_MINIMUM_ENGLISH_WORDS = 4

# Messages with placeholders, plurals or markup are no whole text.
_UNWHOLE = frozenset("${}<>%…|\n\\")


def aligned_segments(messages: Mapping[str, Mapping[Any, str]]) -> list[dict[str, str]]:
    """Language -> message for each key that qualifies in every language, in the order of the English
    catalogue's keys."""
    common = [key for key in messages["en"] if all(key in messages[language] for language in NATURAL)]
    segments = []
    seen: set[str] = set()
    for key in common:
        raw = {language: messages[language][key] for language in NATURAL}
        if len(raw["en"]) < _MINIMUM_ENGLISH_CHARACTERS or len(raw["en"].split()) < _MINIMUM_ENGLISH_WORDS:
            continue
        if any(_UNWHOLE & set(text) for text in raw.values()):
            continue
        segment = {language: clean_line(text) for language, text in raw.items()}
        marks = {fingerprint(text) for text in segment.values()}
        if (
            len(marks) < len(NATURAL)
            or marks & seen
            or not all(is_language(text, language) for language, text in segment.items())
        ):
            continue
        seen |= marks
        segments.append(segment)
    return segments


def select(segments: Sequence[Mapping[str, str]], limit_bytes: int) -> list[list[Mapping[str, str]]]:
    """Whole documents of MESSAGES_PER_DOCUMENT consecutive segments, at most `limit_bytes` of English, in
    their first order."""
    whole = range(0, len(segments) - MESSAGES_PER_DOCUMENT + 1, MESSAGES_PER_DOCUMENT)
    documents = [(number, list(segments[start : start + MESSAGES_PER_DOCUMENT])) for number, start in enumerate(whole)]

    def english(document: Sequence[Mapping[str, str]]) -> bytes:
        return "\n".join(segment["en"] for segment in document).encode()

    chosen = []
    total = 0
    for number, document in sorted(documents, key=lambda numbered: hashlib.sha256(english(numbered[1])).digest()):
        total += len(english(document))
        if total > limit_bytes:
            break
        chosen.append((number, document))
    return [document for _, document in sorted(chosen, key=lambda numbered: numbered[0])]
