"""Which documents say the same: exactly, by a hash of the normalized text, or nearly, by MinHash and a check
of the true similarity.

MinHash (Broder, 1997) with locality-sensitive hashing finds candidates: documents that agree in all rows of a
band of their signatures. Every candidate pair is then compared by the Jaccard similarity of its shingles, so
that chance agreement removes nothing. Shingles are five words, or ten characters where no spaces are written;
they are of one kind in all languages and sources, so copies are found across both.

Legend: U units of a text, G shingles, P permutations, B bands, R rows of a band.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from aurora_jax.data.curation.units import hash_ngrams, hash_units, is_unspaced, normalize, split_units

if TYPE_CHECKING:
    from datasketch import MinHash

SHINGLE_WORDS = 5
SHINGLE_CHARACTERS = 10
PERMUTATIONS = 128
# In a crowded bucket each document is compared with so many that follow it, not with all: copies of copies
# still hang together.
BUCKET_WINDOW = 64
# Missing a pair costs a duplicate, a needless candidate only a comparison.
_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT = 0.01, 0.99


@dataclass(frozen=True, order=True)
class ClusterNode:
    """A document in the graph of duplicates; of several the first in this order is kept: the longest, then
    the first by key."""

    negative_length: int
    key: str


def text_hash(text: str) -> bytes:
    """Equal for texts that differ at most in case, width of characters and white space; 16 bytes."""
    return hashlib.blake2b(" ".join(normalize(text).split()).encode(), digest_size=16).digest()


def shingles(text: str) -> np.ndarray:
    """The distinct shingles of a text, sorted; uint64 [G]. A text that is shorter than a shingle is one; one
    without words has none."""
    units = split_units(normalize(text))
    if not units:
        return np.empty(0, dtype=np.uint64)
    unspaced = sum(map(is_unspaced, units)) > len(units) / 2
    unit_U = hash_units(units)
    return np.unique(hash_ngrams(unit_U, min(SHINGLE_CHARACTERS if unspaced else SHINGLE_WORDS, len(units))))


def jaccard(shingle_G: np.ndarray, other_G: np.ndarray) -> float:
    """The share of all shingles of two sorted sets that both have."""
    common = len(np.intersect1d(shingle_G, other_G, assume_unique=True))
    return common / max(len(shingle_G) + len(other_G) - common, 1)


@functools.cache
def bands_and_rows(similarity: float) -> tuple[int, int]:
    """How the signature is cut for a least similarity: (B, R) with B * R <= PERMUTATIONS."""
    from datasketch import MinHashLSH

    index = MinHashLSH(
        threshold=similarity, num_perm=PERMUTATIONS, weights=(_FALSE_POSITIVE_WEIGHT, _FALSE_NEGATIVE_WEIGHT)
    )
    return index.b, index.r


def band_hashes(shingle_G: np.ndarray, similarity: float) -> list[bytes]:
    """One key a band: documents that share a key are candidates. None for a text without shingles."""
    if not len(shingle_G):
        return []
    signature = _empty_signature().copy()
    signature.update_batch(shingle_G.tolist())
    bands, rows = bands_and_rows(similarity)
    hash_BR = signature.hashvalues[: bands * rows].astype("<u8").reshape(bands, rows)
    return [
        hashlib.blake2b(band_R.tobytes(), digest_size=16, salt=band.to_bytes(2, "little")).digest()
        for band, band_R in enumerate(hash_BR)
    ]


@functools.cache
def _empty_signature() -> MinHash:
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, scheme="affine64", hashfunc=int)  # shingles are hashes already


def pairs(bucket: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The candidate pairs among the keys of one bucket, the smaller key first."""
    keys = sorted(bucket)
    for number, key in enumerate(keys):
        for other in keys[number + 1 : number + 1 + BUCKET_WINDOW]:
            yield key, other


def losers(edges: Sequence[tuple[ClusterNode, ClusterNode]]) -> Iterator[tuple[str, str]]:
    """(key of a document that goes, key of the one that stays in its stead) for each component of the graph
    of duplicates."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes = sorted({node for edge in edges for node in edge})
    if not nodes:
        return
    numbers = {node: number for number, node in enumerate(nodes)}
    rows, columns = zip(*((numbers[node], numbers[other]) for node, other in edges), strict=True)
    graph = coo_array((np.ones(len(edges), dtype=np.int8), (rows, columns)), shape=(len(nodes), len(nodes)))
    _, component_of = connected_components(graph, directed=False)
    kept: dict[int, ClusterNode] = {}
    for node, component in zip(nodes, component_of.tolist(), strict=True):
        winner = kept.setdefault(component, node)
        if winner is not node:
            yield node.key, winner.key
