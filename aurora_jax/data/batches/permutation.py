"""Keyed permutations of range(n) that are computed, not stored: a Feistel network with cycle walking.

An affine map (i * a + b mod n) would also be a bijection, but it leaves consecutive outputs correlated; a
Feistel network with a good mixing function does not.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aurora_jax.data.splitmix import mixed

ROUNDS = 8  # their keys fill one 64-byte digest; even, so that both halves end where they began
MINIMUM_BITS = 6  # with fewer, the halves are too narrow to be mixed well


def derive_key(*parts: int | str) -> int:
    """A 64-bit key out of names and numbers; the same on every machine and Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class Permutation:
    """A bijection of range(n), chosen by `key`; memory O(1), time O(1) an index.

    Raises:
        ValueError: n is not between 1 and 2**62.
    """

    def __init__(self, n: int, key: int):
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation of range({n}) is not possible: n must be between 1 and 2**62")
        self.n = n
        bits = max(
            MINIMUM_BITS, (n - 1).bit_length()
        )  # the network permutes range(2**bits), less than twice n unless n is tiny
        # Halves of unequal width swap places in each round, so that an odd number of bits needs no larger domain.
        self._widths = (np.uint64(bits // 2), np.uint64(bits - bits // 2))
        digest = hashlib.blake2b(repr((key, n)).encode(), digest_size=8 * ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where the permutation sends each index; int64, of the shape of `indices`.

        Raises:
            IndexError: an index lies outside range(n).
        """
        return self._walk(indices, _forward)

    def inverse(self, indices: np.ndarray) -> np.ndarray:
        """The indices that the permutation sends to these; int64, of the shape of `indices`.

        Raises:
            IndexError: an index lies outside range(n).
        """
        return self._walk(indices, _backward)

    def _walk(self, indices: np.ndarray, network: "Network") -> np.ndarray:
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= self.n):
            raise IndexError(
                f"index {indices.min() if indices.min() < 0 else indices.max()} is outside range({self.n})"
            )
        values = network(indices.reshape(-1).astype(np.uint64), *self._widths, self._round_keys)
        # Cycle walking: what falls outside range(n) goes through again, until it comes home.
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            values[outside] = network(values[outside], *self._widths, self._round_keys)
            outside = outside[values[outside] >= self.n]
        return values.astype(np.int64).reshape(indices.shape)


def permute(permutations: Sequence[Permutation], which: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Where permutation `which[i]` sends `indices[i]`, for all i at once: a batch draws a few numbers from
    each of many permutations.

    Args:
        permutations: of any sizes.
        which: int64 [n], places in `permutations`.
        indices: int64 [n], inside the ranges of their permutations.

    Returns:
        int64 [n].
    """
    n = np.array([permutation.n for permutation in permutations], dtype=np.uint64)[which]
    left, right = np.array([permutation._widths for permutation in permutations], dtype=np.uint64)[which].T
    keys = np.stack([permutation._round_keys for permutation in permutations])[which].T
    values = _forward(indices.astype(np.uint64), left, right, keys)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        values[outside] = _forward(values[outside], left[outside], right[outside], keys[:, outside])
        outside = outside[values[outside] >= n[outside]]
    return values.astype(np.int64)


Network = Callable[[np.ndarray, Any, Any, np.ndarray], np.ndarray]
"""(values [n], widths of the left and right halves (one, or [n]), keys of the rounds (one each, or [ROUNDS,
n])) -> values [n]."""


def _forward(values: np.ndarray, left_width: Any, right_width: Any, keys: np.ndarray) -> np.ndarray:
    left, right = values >> right_width, values & _mask(right_width)
    for key in keys:
        left, right = right, left ^ (mixed(right + key) & _mask(left_width))
        left_width, right_width = right_width, left_width
    return (left << right_width) | right


def _backward(values: np.ndarray, left_width: Any, right_width: Any, keys: np.ndarray) -> np.ndarray:
    left, right = values >> right_width, values & _mask(right_width)
    for key in keys[::-1]:
        left_width, right_width = right_width, left_width
        left, right = right ^ (mixed(left + key) & _mask(left_width)), left
    return (left << right_width) | right


def _mask(width: Any) -> Any:
    return (np.uint64(1) << width) - np.uint64(1)
