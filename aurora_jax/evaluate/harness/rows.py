"""Requests of the harness as rows of token ids, and rows as batches of few shapes.

B batch, L sequence, C questions of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from aurora_jax.model.likelihood import Questions

SHAPES = 4
"""Compiled programs of a kind of request."""
STEP = 8
"""Lengths are multiples of it."""


@dataclass
class Row:
    """Tokens that are read once, and who asks for what behind them.

    Attributes:
        tokens: what the model reads.
        asked: (request, place of the token before, token), in each request's order.
    """

    tokens: list[int]
    asked: list[tuple[int, int, int]] = field(default_factory=list)


def rows_of(requests: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int) -> list[Row]:
    """Rows for (context, continuation) pairs, both not empty.

    What is longer than the model can read loses tokens at the left, as in the harness: of a context and a continuation
    the last `longest` + 1 tokens count. A request whose tokens begin another's is asked in the other's row: attention
    is causal, so that the answers are the same. Continuations of one token behind one context share a row so.
    """
    read: list[tuple[list[int], int, list[int]]] = []
    for request, (context, continuation) in enumerate(requests):
        tokens = [*context, *continuation][-(longest + 1) :]
        read.append((tokens[:-1], request, tokens[len(tokens) - len(continuation) :]))
    rows: list[Row] = []
    for tokens, request, continuation in sorted(read, key=lambda each: each[0], reverse=True):
        if not rows or rows[-1].tokens[: len(tokens)] != tokens:
            rows.append(Row(tokens))
        first = len(tokens) - len(continuation)
        rows[-1].asked += [(request, first + number, token) for number, token in enumerate(continuation)]
    return rows


def batches_of(rows: Sequence[Row], batch_tokens: int, multiple: int) -> Iterator[tuple[list[Row], Questions]]:
    """Batches of at most SHAPES shapes, the longest first: if memory does not suffice, it shows at once.

    Args:
        batch_tokens: tokens of a batch, about.
        multiple: by which the rows of a batch can be divided.
    """
    left = sorted(rows, key=lambda row: -len(row.tokens))
    for length in sorted(lengths_of([len(row.tokens) for row in rows]), reverse=True):
        shorter = [other for other in lengths_of([len(row.tokens) for row in rows]) if other < length]
        group = [row for row in left if len(row.tokens) > max(shorter, default=0)]
        left = left[len(group) :]
        C = max(len(row.asked) for row in group)
        B = max(1, min(batch_tokens // length, len(group)) // multiple) * multiple
        for start in range(0, len(group), B):
            some = group[start : start + B]
            questions = Questions(*(np.zeros(shape, np.int32) for shape in ((B, length), (B, C), (B, C))))
            for number, row in enumerate(some):
                questions.tokens_BL[number, : len(row.tokens)] = row.tokens
                for column, (_, place, token) in enumerate(row.asked):
                    questions.places_BC[number, column], questions.targets_BC[number, column] = place, token
            yield some, questions


def lengths_of(lengths: Sequence[int]) -> list[int]:
    """At most SHAPES lengths, each a multiple of STEP, to which sequences are padded so that the padding is least.

    By dynamic programming over the lengths that there are.
    """
    counts = np.bincount([-(-length // STEP) for length in lengths])
    sizes = [size for size in range(1, len(counts)) if counts[size]]
    waste = np.zeros((len(sizes), len(sizes)))  # of the sizes [first, last], all padded to the last
    for first in range(len(sizes)):
        tokens = 0
        for last in range(first, len(sizes)):
            tokens += counts[sizes[last]] * sizes[last]
            waste[first, last] = counts[sizes[first] : sizes[last] + 1].sum() * sizes[last] - tokens
    best = [(waste[0, last], [last]) for last in range(len(sizes))]
    for _ in range(SHAPES - 1):
        best = [
            min(
                [
                    best[last],
                    *((best[cut][0] + waste[cut + 1, last], [*best[cut][1], last]) for cut in range(last)),
                ],
                key=lambda each: each[0],
            )
            for last in range(len(sizes))
        ]
    return [sizes[last] * STEP for last in best[-1][1]]
