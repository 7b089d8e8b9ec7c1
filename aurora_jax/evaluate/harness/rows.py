"""Requests of the harness as rows of token ids, and rows as batches of few shapes.

B batch, L sequence, U questions.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from aurora_jax.model.attention import EVERYONES
from aurora_jax.model.likelihood import Questions

SHAPES = 4
"""Compiled programs of a kind of request."""
STEP = 8
"""Lengths are multiples of it."""


@dataclass
class ReadRow:
    """Tokens that are read once, and who asks for what behind them.

    Attributes:
        tokens: what the model reads: the beginning that several texts share, and then the rest of each.
        asked: (request, place of the token before, token), in each request's order.
        beginning: tokens that the texts share.
        rests: tokens of each text's rest.
    """

    tokens: list[int]
    asked: list[tuple[int, int, int]]
    beginning: int
    rests: list[int]

    def positions(self) -> list[int]:
        """Of each token in its text."""
        rests = (range(self.beginning, self.beginning + rest) for rest in self.rests)
        return list(itertools.chain(range(self.beginning), *rests))

    def segment_ids(self) -> list[int]:
        """The text of each token."""
        return [EVERYONES] * self.beginning + [number for number, rest in enumerate(self.rests) for _ in range(rest)]


def rows_of(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int, share_beginnings: bool = False
) -> list[ReadRow]:
    """Rows for (context, continuation) pairs, both not empty.

    What is longer than the model can read loses tokens at the left, as in the harness: of a context and a continuation
    the last `longest` + 1 tokens count. A request whose tokens begin another's is asked in the other's row: attention
    is causal, so that the answers are the same. Continuations of one token behind one context share a row so.

    Args:
        share_beginnings: put texts that begin alike into one row where that saves tokens (several continuations of one
            context); up to `longest` tokens.
    """
    read: list[tuple[list[int], int, list[int]]] = []
    for request, (context, continuation) in enumerate(requests):
        tokens = [*context, *continuation][-(longest + 1) :]
        read.append((tokens[:-1], request, tokens[len(tokens) - len(continuation) :]))
    texts: list[ReadRow] = []
    for tokens, request, continuation in sorted(read, key=lambda each: each[0], reverse=True):
        if not texts or texts[-1].tokens[: len(tokens)] != tokens:
            texts.append(ReadRow(tokens, [], len(tokens), []))
        first = len(tokens) - len(continuation)
        texts[-1].asked += [(request, first + number, token) for number, token in enumerate(continuation)]
    return list(_joined(texts, longest)) if share_beginnings else texts


def _joined(texts: Sequence[ReadRow], longest: int) -> Iterator[ReadRow]:
    """Neighbours in order of their tokens, as long as another one saves tokens."""
    group: list[ReadRow] = []
    beginning = total = 0
    for text in texts:
        same = _same(group[0].tokens, text.tokens, beginning) if group else 0
        joined = same + sum(len(each.tokens) - same for each in group) + len(text.tokens) - same
        if group and (joined >= total + len(text.tokens) or joined > longest):
            yield _row(group, beginning)
            group = []
        if group:
            beginning, total = same, joined
        else:
            beginning = total = len(text.tokens)
        group.append(text)
    if group:
        yield _row(group, beginning)


def _same(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """Tokens at the beginning of both, up to `most`."""
    pairs = zip(one[:most], other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(most, len(other)))


def _row(group: Sequence[ReadRow], beginning: int) -> ReadRow:
    row = ReadRow(group[0].tokens[:beginning], [], beginning, [])
    for text in group:
        moved = len(row.tokens) - beginning
        row.asked += [(of, place + (moved if place >= beginning else 0), token) for of, place, token in text.asked]
        row.tokens = row.tokens + text.tokens[beginning:]
        row.rests.append(len(text.tokens) - beginning)
    return row


@dataclass(frozen=True)
class RowBatch:
    """What is read at once.

    Attributes:
        questions: arrays for `Likelihood.answers`.
        asked: of each answer that counts, its place among them, and the request and the token that it is about.
    """

    questions: Questions
    asked: list[tuple[int, int, int]]


def batches_of(
    rows: Sequence[ReadRow], batch_tokens: int, parts: int, share_beginnings: bool = False
) -> Iterator[RowBatch]:
    """Batches of at most SHAPES shapes, the longest rows first: if memory does not suffice, it shows at once.

    Args:
        batch_tokens: tokens of a batch, about.
        parts: of the mesh, over which rows are divided.
        share_beginnings: as the rows were made.
    """
    lengths = sorted(lengths_of([len(row.tokens) for row in rows]), reverse=True)
    for length, shorter in zip(lengths, [*lengths[1:], 0], strict=True):
        group = [row for row in rows if shorter < len(row.tokens) <= length]
        # Those that ask for much are dealt out first, to those that have least: every part has about as many questions.
        rows_of_part = max(1, min(batch_tokens // length, len(group)) // parts)
        dealt: list[list[ReadRow]] = [[] for _ in range(-(-len(group) // (rows_of_part * parts)) * parts)]
        least = [(0, number) for number in range(len(dealt))]
        for row in sorted(group, key=lambda row: -len(row.asked)):
            count, number = heapq.heappop(least)
            dealt[number].append(row)
            if len(dealt[number]) < rows_of_part:
                heapq.heappush(least, (count + len(row.asked), number))
        most = max(sum(len(row.asked) for row in part) for part in dealt)
        for start in range(0, len(dealt), parts):
            yield _batch(dealt[start : start + parts], length, rows_of_part, most, share_beginnings)


def _batch(parts: Sequence[Sequence[ReadRow]], length: int, rows: int, most: int, share_beginnings: bool) -> RowBatch:
    """Args:
    rows: of each part.
    most: questions of each part.
    """
    whole, asked_for = (len(parts) * rows, length), (len(parts) * most,)
    shapes = [whole, asked_for, asked_for, *[whole] * (2 * share_beginnings)]
    questions, asked = Questions(*(np.zeros(shape, np.int32) for shape in shapes)), []
    for number, part in enumerate(parts):
        index = number * most
        for in_part, row in enumerate(part):
            of_row = (number * rows + in_part, slice(len(row.tokens)))
            questions.tokens_BL[of_row] = row.tokens
            if share_beginnings:
                questions.positions_BL[of_row] = row.positions()
                questions.segment_ids_BL[of_row] = row.segment_ids()
            for request, place, token in row.asked:
                questions.places_U[index], questions.targets_U[index] = in_part * length + place, token
                asked.append((index, request, token))
                index += 1
    return RowBatch(questions, asked)


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
