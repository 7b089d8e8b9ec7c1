"""What is known of a mixture's tasks: rates, licences, files and stores, and how often a planned run reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

from aurora_jax.data.batches.store import StoreInfo, read_info
from aurora_jax.data.corpora.catalogue import MIXTURES, stated_rates, task_spec
from aurora_jax.data.text.sources import TaskSpec
from aurora_jax.errors import InputError
from aurora_jax.storage.files import File, find_all

UNKNOWN = "–"


@dataclass(frozen=True)
class TaskRow:
    """A task of a mixture, as far as it is known.

    Attributes:
        name: of the task.
        rate: its share of the mixture; the rates of a mixture add up to 1.
        language: of its documents; a dash where the task does not say.
        kind: web, code, encyclopedia, instruction, safety or domain; a dash where the task does not say.
        license: as its publisher states it; a dash where the task does not say.
        origin: where its files come from.
        expected: patterns of its files; empty where a source of SeqIO's own finds them.
        found: the files that are there; None where nobody can tell.
        store: what its token store holds; None without a complete one.
        epochs: how often the planned run reads it; None without a store or a plan.
        note: what to know of it.
    """

    name: str
    rate: float
    language: str
    kind: str
    license: str
    origin: str
    expected: tuple[str, ...]
    found: tuple[File, ...] | None
    store: StoreInfo | None
    epochs: float | None
    note: str


def rates_of(mixture: str, data_root: str, modules: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """(task, rate) of a mixture as the training loop has them, by name.

    Ours come from the catalogue; others, and everything where modules are given, from SeqIO's registry, for
    which any tokenizer does.

    Raises:
        InputError: no mixture or task has that name, or a module cannot be imported.
    """
    if (stated := stated_rates(mixture)) is not None:
        return stated
    if not modules:
        if mixture in MIXTURES:
            return tuple(sorted(MIXTURES[mixture].items()))
        if task_spec(data_root, mixture) is not None:
            return ((mixture, 1.0),)
        raise InputError(
            f"no mixture or task of ours is named {mixture!r}; mixtures are {', '.join(MIXTURES)}; others "
            "need --modules"
        )
    from aurora_jax.data.registry import tasks
    from aurora_jax.data.registry.vocabulary import vocabulary_from

    tasks.register(data_root, vocabulary_from("bytes"), modules)
    return tasks.mixture_rates(mixture)


def task_rows(
    rates: Sequence[tuple[str, float]],
    data_root: str,
    stores: str,
    sequences: int | None = None,
    sequence_length: int = 2048,
) -> list[TaskRow]:
    """What is known of each task, the largest rate first.

    Args:
        rates: (task, rate) pairs; they need not add up to 1.
        data_root: folder of the sources.
        stores: folder of the token stores.
        sequences: of the planned run.
        sequence_length: of the planned run, in tokens.

    Raises:
        InputError: a file system cannot be reached, or a store's description is malformed.
    """
    total = sum(rate for _, rate in rates)
    rows = []
    for name, rate in sorted(rates, key=lambda pair: (-pair[1], pair[0])):
        store = read_info(f"{stores.rstrip('/')}/{name}/train")
        epochs = None
        if store is not None and sequences is not None:
            epochs = sequences * rate / total / max(1, -(-(store.tokens - 1) // sequence_length))
        spec = task_spec(data_root, name)
        row = _known(spec) if spec is not None else _foreign(name)
        rows.append(TaskRow(name=name, rate=rate / total, store=store, epochs=epochs, **row))
    return rows


def _known(spec: TaskSpec) -> dict:
    expected = spec.source.splits["train"]
    return {
        "language": spec.source.language,
        "kind": spec.kind or UNKNOWN,
        "license": spec.source.license,
        "origin": spec.origin or UNKNOWN,
        "expected": expected,
        "found": tuple(find_all(expected)),
        "note": spec.note,
    }


def _foreign(name: str) -> dict:
    """A task of somebody else's module: its source may be ours, or SeqIO's own, which only says how many
    shards it has, if that."""
    from aurora_jax.data.registry.tasks import source_of

    source, origin = source_of(name)
    if source is not None and "train" in source.splits:
        return _known(TaskSpec(name, source))
    return {
        "language": UNKNOWN,
        "kind": UNKNOWN,
        "license": UNKNOWN,
        "origin": origin,
        "expected": (),
        "found": None,
        "note": "",
    }


def shares(rows: Sequence[TaskRow], by: str) -> dict[str, float]:
    """Share of the mixture by an attribute of its tasks, the largest first."""
    result: dict[str, float] = {}
    for row in rows:
        result[getattr(row, by)] = result.get(getattr(row, by), 0.0) + row.rate
    return dict(sorted(result.items(), key=lambda item: (-item[1], item[0])))


def rate_text(rate: float) -> str:
    """A rate as a percentage with three figures, however small."""
    return f"{rate * 100:#.3g}%" if rate >= 1e-6 else f"{rate * 100:.1e}%"
