"""Block-deterministic mixtures: which task, and which of its sequences, stands at a position of the stream.

The stream is cut into blocks. After b blocks every task has had its exact share of them, rounded by the
largest remainder; what rounding kept back in one block is paid in a later one, so that realised rates never
stray by a whole sequence at a block's end. Inside a block a keyed permutation sets the order.
"""

import math
from collections.abc import Container, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from aurora_jax.data.batches.permutation import Permutation, derive_key
from aurora_jax.errors import InputError

DEFAULT_BLOCK_SIZE = (
    256  # small enough that a run of a few hundred sequences keeps its rates; a task's share may be as low as 1/256
)

NAMED = 8  # tasks in a message; `aurora data describe` names them all


def block_size_for(rates: Sequence[float]) -> int:
    """A block in which even the smallest rate is a whole sequence: the default, or the next power of two that
    is large enough.

    Larger blocks hold the same rates; only it takes longer until they hold exactly.
    """
    wanted = math.ceil(sum(map(Fraction, rates)) / Fraction(min(rates)))
    return max(DEFAULT_BLOCK_SIZE, 1 << (wanted - 1).bit_length())


def left_out(name: str, rates: Sequence[tuple[str, float]], there: Container[str]) -> str:
    """What a mixture loses, and the others gain, where only some of its tasks are there; empty where all are."""
    missing = {task: rate for task, rate in rates if task not in there}
    if not missing:
        return ""
    share = sum(missing.values()) / sum(rate for _, rate in rates)
    rest = (
        f"the rates of the others are {1 / (1 - share):.3g} times what they were"
        if len(missing) < len(rates)
        else "nothing is left"
    )
    names = [*sorted(missing)[:NAMED], *([f"{len(missing) - NAMED} more"] if len(missing) > NAMED else [])]
    return f"left out of {name}: {len(missing)} of {len(rates)} tasks, {share:.1%} of it ({', '.join(names)}); {rest}"


class BlockMixture:
    """A deterministic interleaving of tasks at given rates; a function of the sequence index alone, O(1) in it.

    Attributes:
        rates: the normalised rates, exact fractions in the order given.

    Raises:
        InputError: a rate is not positive, or so small that a task would miss whole blocks.
    """

    def __init__(self, rates: Sequence[float], *, key: int, block_size: int = DEFAULT_BLOCK_SIZE):
        if not rates or not all(0 < rate < float("inf") for rate in rates):
            raise InputError(f"mixture rates must be positive and finite, not {list(rates)}")
        total = sum(Fraction(rate) for rate in rates)
        self.rates = tuple(Fraction(rate) / total for rate in rates)
        self.block_size = block_size
        # With at least one sequence in each block, the largest-remainder shares of successive blocks never step back.
        if min(self.rates) * block_size < 1:
            raise InputError(
                f"the smallest mixture rate, {float(min(self.rates)):.3g} of the total, is under one sequence "
                f"in a block of {block_size}; "
                f"raise block_size to at least {-(-1 // min(self.rates))} or the rate"
            )
        self._key = key
        self._layout = lru_cache(maxsize=16)(self._compute_layout)

    def assign(self, sequence_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The task (its place in `rates`) at each sequence index, and how many of that task came before; both
        int64, of its shape."""
        sequence_index = np.asarray(sequence_index, dtype=np.int64)
        block, slot = np.divmod(sequence_index, self.block_size)
        task, index = np.empty_like(block), np.empty_like(block)
        for b in np.unique(block):
            here = block == b
            task_S, index_S = self._layout(int(b))
            task[here], index[here] = task_S[slot[here]], index_S[slot[here]]
        return task, index

    def consumed(self, sequences: int) -> np.ndarray:
        """How many of the first `sequences` belong to each task; int64 [tasks]."""
        block, slot = divmod(sequences, self.block_size)
        task_S, _ = self._layout(block)
        return self._shares(block) + np.bincount(task_S[:slot], minlength=len(self.rates))

    def _shares(self, blocks: int) -> np.ndarray:
        """Sequences of each task in the first `blocks` blocks, by largest remainder; they sum to blocks *
        block_size. int64 [tasks]."""
        exact = [blocks * self.block_size * rate for rate in self.rates]
        shares = [int(share) for share in exact]
        missing = blocks * self.block_size - sum(shares)
        by_remainder = sorted(range(len(exact)), key=lambda task: (shares[task] - exact[task], task))
        for task in by_remainder[:missing]:
            shares[task] += 1
        return np.array(shares, dtype=np.int64)

    def _compute_layout(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Task and index within the task for each slot of a block; int64 [block_size] both."""
        before = self._shares(block)
        counts = self._shares(block + 1) - before
        order = Permutation(self.block_size, derive_key(self._key, "block", block))
        task_S = np.repeat(np.arange(len(counts)), counts)[order(np.arange(self.block_size))]
        index_S = np.empty_like(task_S)
        for task, count in enumerate(counts):
            index_S[task_S == task] = before[task] + np.arange(count)
        return task_S, index_S
