"""The loader: a batch is a pure function of (seed, stage table, step). There is no iterator state; to resume
is to ask for the next step.

Shape suffixes: B sequences of the batch (or the rows of it that this host asks for), L positions of a sequence.

Window i of a task covers the L + 1 tokens [i * L, (i + 1) * L] of its store: L inputs and, one further, L
targets. So every token of the store but the first is a target once an epoch; where documents are isolated,
every token but the first of each document, which nothing that it may see precedes. A keyed Feistel
permutation orders the windows of each epoch; epochs go on across stages. Token values decide nothing: token 0
is real.
"""

from collections import deque
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from aurora_jax.data.batches.mixture import DEFAULT_BLOCK_SIZE, BlockMixture, block_size_for
from aurora_jax.data.batches.permutation import Permutation, derive_key, permute
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.errors import InputError


@dataclass(frozen=True)
class DataStage:
    """A row of the stage table, as far as data goes.

    Attributes:
        name: for logs and messages.
        rates: (task name, relative rate) pairs, in sequences.
        steps: how many steps the stage lasts.
        block_size: sequences over which the rates hold exactly; see `mixture.py`.
    """

    name: str
    rates: tuple[tuple[str, float], ...]
    steps: int
    block_size: int = DEFAULT_BLOCK_SIZE


def stage_over(stores: Container[str], name: str, rates: Sequence[tuple[str, float]], steps: int) -> DataStage:
    """A stage of those tasks that have a store, with blocks that hold its smallest rate. Raises InputError if
    none has."""
    there = tuple((task, rate) for task, rate in rates if task in stores)
    if not there:
        raise InputError(f"stage {name!r}: none of its tasks has a store: {', '.join(task for task, _ in rates)}")
    return DataStage(name, there, steps, block_size_for([rate for _, rate in there]))


class Place(NamedTuple):
    """Where a row of a batch comes from.

    Attributes:
        stage: name of its stage.
        stage_step: the step, counted from the stage's first.
        task: name of its task.
        epoch: of the task, from 0.
        turn: which window of the epoch it is, in the order of training, from 0.
        windows: windows of an epoch.
        start: its first token's place in the task's store.
    """

    stage: str
    stage_step: int
    task: str
    epoch: int
    turn: int
    windows: int
    start: int


class Batch(NamedTuple):
    """One batch of next-token prediction, as numpy arrays.

    Attributes:
        tokens_BL: int32, inputs.
        targets_BL: int32, the token after each input.
        loss_weights_BL: float32; 0 where there is no target to learn (padding, by position; questions, by the store's
            mask; the next document's first token, where documents are isolated), else 1.
        segment_ids_BL: int32; 0 on padding. Tokens attend within their segment only.
        positions_BL: int32, the position of each token for the model.
        task_ids_B: int32, the place of each sequence's task in `Loader.tasks`.
    """

    tokens_BL: np.ndarray
    targets_BL: np.ndarray
    loss_weights_BL: np.ndarray
    segment_ids_BL: np.ndarray
    positions_BL: np.ndarray
    task_ids_B: np.ndarray

    def isolation(self, isolate_documents: bool) -> dict[str, Any]:
        """What the decoder is told besides the tokens, in training and in evaluation alike.

        Without isolation there is nothing to mask: positions are 0 .. L-1, and padding lies right of all that is causal
        to it.
        """
        return {"positions_BL": self.positions_BL, "segment_ids_BL": self.segment_ids_BL} if isolate_documents else {}


class Loader:
    """Batches over token stores, stage after stage.

    Attributes:
        tasks: names of the tasks, sorted; `Batch.task_ids_B` counts in them.
        steps: total steps of all stages; `batch` knows the steps [0, steps).
        batch_size: sequences of the global batch.

    Raises:
        InputError: a stage names a task without a store, has no steps or impossible rates, or stores do not
            fit together or are too short.
    """

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        stages: Sequence[DataStage],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        attend_across_documents: bool = True,
    ):
        """Takes the stores by task name and the stage table.

        Args:
            stores: the tasks' stores, all made with one tokenizer.
            stages: the stage table, in order.
            batch_size: B, sequences of the global batch.
            sequence_length: L, tokens.
            seed: keys every permutation.
            attend_across_documents: True: a sequence is one segment, positions 0 .. L-1. False: each document is a
                segment, its positions start from 0, and no target crosses from one to the next.
        """
        _check(stores, stages, batch_size, sequence_length)
        self.tasks = tuple(sorted({task for stage in stages for task, _ in stage.rates}))
        self.steps = sum(stage.steps for stage in stages)
        self._stores = [stores[task] for task in self.tasks]
        self.batch_size = batch_size
        self._length = sequence_length
        self._seed = seed
        self._across = attend_across_documents
        self._windows = np.array([window_count(store, sequence_length) for store in self._stores], dtype=np.int64)
        self._stages: list[_PlacedStage] = []
        first_step, consumed = 0, np.zeros(len(self.tasks), dtype=np.int64)
        for number, stage in enumerate(stages):
            mixture = BlockMixture(
                [rate for _, rate in stage.rates], key=derive_key(seed, "stage", number), block_size=stage.block_size
            )
            placed = _PlacedStage(
                stage, first_step, consumed, mixture, np.array([self.tasks.index(task) for task, _ in stage.rates])
            )
            self._stages.append(placed)
            first_step, consumed = first_step + stage.steps, placed.consumed_after(stage.steps * batch_size)

    def batch(self, step: int, rows: slice | np.ndarray | None = None) -> Batch:
        """The batch of a step, or some rows of it (a host's share): only these are read.

        Raises:
            IndexError: the step is outside [0, steps).
        """
        task_B, _, _, window_B = self._windows_of(step, rows if rows is not None else slice(None))
        batch = _empty_batch(len(task_B), self._length)
        batch.task_ids_B[:] = task_B
        for task in np.unique(task_B).tolist():
            here = np.flatnonzero(task_B == task)
            store, starts = self._stores[task], window_B[here] * self._length
            _fill(batch, here, store, starts, self._across)
        return batch

    def place(self, step: int, row: int) -> Place:
        """Where a row of the batch of a step comes from. Raises IndexError: there is no such step or row."""
        if not 0 <= row < self.batch_size:
            raise IndexError(f"row {row} is outside the batch, which has the rows [0, {self.batch_size})")
        stage = self._stage_at(step)
        task, epoch, turn, window = (int(value[0]) for value in self._windows_of(step, slice(row, row + 1)))
        windows = int(self._windows[task])
        return Place(
            stage.stage.name, step - stage.first_step, self.tasks[task], epoch, turn, windows, window * self._length
        )

    def _windows_of(self, step: int, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Task, epoch, turn within the epoch, and window of rows of a batch; int64 [B] each."""
        stage = self._stage_at(step)
        row = np.arange(self.batch_size, dtype=np.int64)[rows]
        task_B, index_B = stage.assign((step - stage.first_step) * self.batch_size + row)
        epoch_B, turn_B = np.divmod(index_B, self._windows[task_B])
        pairs, which_B = np.unique(np.stack([task_B, epoch_B], axis=1), axis=0, return_inverse=True)
        orders = [
            Permutation(int(self._windows[task]), derive_key(self._seed, self.tasks[task], epoch))
            for task, epoch in pairs.tolist()
        ]
        window_B = permute(orders, which_B, turn_B)
        return task_B, epoch_B, turn_B, window_B

    def prefetched(
        self, first_step: int, last_step: int, depth: int = 2, rows: slice | np.ndarray | None = None
    ) -> Generator[tuple[int, Batch], None, None]:
        """Yields (step, batch) for the steps [first_step, last_step), with the next `depth` batches computed
        in threads meanwhile.

        An exception in a thread is raised at its step. Closing the generator (or leaving its loop and
        dropping it) ends the threads.
        """
        pending: deque[tuple[int, Future[Batch]]] = deque()
        pool = ThreadPoolExecutor(max_workers=depth, thread_name_prefix="loader")
        try:
            for step in range(first_step, last_step):
                pending.append((step, pool.submit(self.batch, step, rows)))
                if len(pending) > depth:
                    ready, batch = pending.popleft()
                    yield ready, batch.result()
            for ready, batch in pending:
                yield ready, batch.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def position(self, step: int) -> dict[str, Any]:
        """Where the data stands before a step, for logs: {"stage": name, "stage_step": int, "epochs": {task:
        epochs consumed, fractional}}.

        Raises:
            IndexError: the step is outside [0, steps).
        """
        stage = self._stage_at(step)
        consumed = stage.consumed_after((step - stage.first_step) * self.batch_size)
        epochs = {
            task: float(sequences / windows)
            for task, sequences, windows in zip(self.tasks, consumed, self._windows, strict=True)
        }
        return {"stage": stage.stage.name, "stage_step": step - stage.first_step, "epochs": epochs}

    def _stage_at(self, step: int) -> "_PlacedStage":
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside the stage table, which has the steps [0, {self.steps})")
        return next(stage for stage in reversed(self._stages) if stage.first_step <= step)


@dataclass(frozen=True)
class _PlacedStage:
    """A stage with its place in the run.

    `before` int64 [tasks] holds the sequences of each task in earlier stages; `task_ids` int64 [tasks of the
    stage] their places in `Loader.tasks`.
    """

    stage: DataStage
    first_step: int
    before: np.ndarray
    mixture: BlockMixture
    task_ids: np.ndarray

    def assign(self, sequence_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Task and index within the task, counted from the start of the run, of sequences of this stage."""
        task, index = self.mixture.assign(sequence_index)
        task = self.task_ids[task]
        return task, self.before[task] + index

    def consumed_after(self, sequences: int) -> np.ndarray:
        """Sequences of each task from the start of the run, after so many of this stage; int64 [tasks]."""
        consumed = self.before.copy()
        consumed[self.task_ids] += self.mixture.consumed(sequences)
        return consumed


def evaluation_batches(
    store: TokenStore,
    batch_size: int,
    sequence_length: int,
    *,
    attend_across_documents: bool = True,
    windows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Windows of a held-out store, cut and masked as `Loader` does for training; the last batch is filled up with rows
    of padding.

    Loss weights are also 0 for the EOS that ends a document (known from the documents' ends, not from its value), which
    is no text. What is left are the tokens of the text that a model is asked to predict: not the store's very first,
    and not the first of any isolated document.

    Args:
        attend_across_documents: as in `Loader`.
        windows: numbers of those to read, in this order; all of them, in the store's order, without it.
    """
    numbers = np.arange(window_count(store, sequence_length), dtype=np.int64) if windows is None else windows
    for first in range(0, len(numbers), batch_size):
        starts = numbers[first : first + batch_size] * sequence_length
        batch = _empty_batch(batch_size, sequence_length)
        rows = np.arange(len(starts))
        _fill(batch, rows, store, starts, attend_across_documents)
        if store.info.eos_id is not None:
            batch.loss_weights_BL[rows] *= ~store.window_ends(starts + 1, sequence_length)
        yield batch


def spread_windows(windows: int, chosen: int) -> np.ndarray:
    """An even draw of `chosen` out of `windows` windows, the middles of as many equal spans; all, if there are no more.
    int64, ascending."""
    chosen = min(chosen, windows)
    return (2 * np.arange(chosen, dtype=np.int64) + 1) * windows // (2 * chosen)


def window_count(store: TokenStore, sequence_length: int) -> int:
    """Windows of an epoch: enough that every token but the first is a target once."""
    return -(-(len(store) - 1) // sequence_length)


def _empty_batch(rows: int, length: int) -> Batch:
    """All padding."""
    positions_BL = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    tokens_BL, targets_BL, segment_ids_BL = (np.zeros((rows, length), dtype=np.int32) for _ in range(3))
    return Batch(
        tokens_BL,
        targets_BL,
        np.zeros((rows, length), dtype=np.float32),
        segment_ids_BL,
        positions_BL,
        np.zeros(rows, dtype=np.int32),
    )


def _fill(batch: Batch, rows: np.ndarray, store: TokenStore, starts: np.ndarray, across: bool) -> None:
    """Writes the windows of a store that begin at `starts` into the given rows of an empty batch."""
    length = batch.tokens_BL.shape[1]
    window_BL = store.windows(starts, length + 1)
    place_L = np.arange(length)
    valid_BL = starts[:, None] + place_L[None, :] < len(store) - 1  # the target lies inside the store
    batch.tokens_BL[rows] = window_BL[:, :-1] * valid_BL
    batch.targets_BL[rows] = window_BL[:, 1:] * valid_BL
    batch.loss_weights_BL[rows] = valid_BL
    if store.info.masked:
        batch.loss_weights_BL[rows] *= store.window_learn(starts + 1, length)
    if across:
        batch.segment_ids_BL[rows] = valid_BL
        return
    ends_BL = store.window_ends(starts, length)
    # What follows an end belongs to the next document: the end is not asked for it.
    batch.loss_weights_BL[rows] *= ~ends_BL
    # A document begins after an end, and at the window's first token.
    begins_BL = np.ones_like(valid_BL)
    begins_BL[:, 1:] = ends_BL[:, :-1]
    batch.segment_ids_BL[rows] = np.cumsum(begins_BL, axis=1) * valid_BL
    batch.positions_BL[rows] = place_L[None, :] - np.maximum.accumulate(
        np.where(begins_BL, place_L[None, :], 0), axis=1
    )


def _check(
    stores: Mapping[str, TokenStore], stages: Sequence[DataStage], batch_size: int, sequence_length: int
) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise InputError(f"batch_size ({batch_size}) and sequence_length ({sequence_length}) must be at least 1")
    if not stages:
        raise InputError("the stage table is empty; give at least one stage")
    for stage in stages:
        names = [task for task, _ in stage.rates]
        if stage.steps < 1:
            raise InputError(f"stage {stage.name!r} has {stage.steps} steps; give at least 1")
        if len(set(names)) < len(names):
            raise InputError(f"stage {stage.name!r} names a task twice: {', '.join(names)}")
        for task in names:
            if task not in stores:
                raise InputError(
                    f"stage {stage.name!r} draws on task {task!r}, which has no store; there are: "
                    f"{', '.join(sorted(stores)) or 'none'}"
                )
            if len(stores[task]) < 2:
                raise InputError(
                    f"{stores[task].directory}: the store of task {task!r} holds {len(stores[task])} tokens; "
                    "at least 2 make a window"
                )
    tokenizers = {stores[task].info.tokenizer_sha256: task for stage in stages for task, _ in stage.rates}
    if len(tokenizers) > 1:
        (one, task), (other, other_task), *_ = tokenizers.items()
        raise InputError(
            f"stores made with different tokenizers: {task!r} with {one[:12]}, {other_task!r} with "
            f"{other[:12]}; build them with one"
        )
