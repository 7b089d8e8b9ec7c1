"""What a text is counted in: words where the script puts spaces between them, characters where it does not.

Repetition, duplicates and contamination all look at runs of these units, by 64-bit hashes that are the same
in every process and on every machine (Python's own `hash` is not).

Legend: U units of a text, G n-grams of units.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata

import numpy as np
import regex

from aurora_jax.data.splitmix import mixed
from aurora_jax.languages import UNSPACED

# `regex`, not `re`: the \w of `re` breaks Devanagari words at every vowel sign.
_UNIT = regex.compile(rf"[{UNSPACED}]|[\w--[{UNSPACED}]]+", regex.V1)
_UNSPACED_CHARACTER = regex.compile(rf"[{UNSPACED}]", regex.V1)

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normalize(text: str) -> str:
    """Compatibility characters, width and case made equal: two texts that read the same compare equal."""
    return unicodedata.normalize("NFKC", text).casefold()


def split_units(text: str) -> list[str]:
    """The words of a text, and one by one the characters of scripts that put no spaces between words.
    Punctuation is left out."""
    return _UNIT.findall(text)


def is_unspaced(unit: str) -> bool:
    """Whether a unit is a character of a script without spaces."""
    return _UNSPACED_CHARACTER.match(unit) is not None


def hash_units(units: list[str]) -> np.ndarray:
    """A hash of each unit; uint64 [U]."""
    return np.fromiter(map(_hash_unit, units), dtype=np.uint64, count=len(units))


@functools.lru_cache(maxsize=1 << 18)
def _hash_unit(unit: str) -> int:
    return int.from_bytes(hashlib.blake2b(unit.encode(), digest_size=8).digest(), "little")


def hash_characters(text: str) -> np.ndarray:
    """The code points of a text; uint64 [U]."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)


def hash_ngrams(units_U: np.ndarray, length: int) -> np.ndarray:
    """A hash of every `length` consecutive units; uint64 [G = U - length + 1], or none where the text is shorter."""
    count = len(units_U) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    hash_G = np.full(count, length, dtype=np.uint64)
    for offset in range(length):
        hash_G = hash_G * _MULTIPLIER + units_U[offset : offset + count]
    # Without this, hashes of runs that share their last units share their low bits.
    return mixed(hash_G)
