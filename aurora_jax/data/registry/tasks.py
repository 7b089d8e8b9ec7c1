"""SeqIO's side of the data: sources and preprocessors of ours as SeqIO takes them, and recipes out of SeqIO's registry.

A task is registered in SeqIO's own way, with `FileSource` and `Prepare` or with any source and preprocessors of SeqIO:

    seqio.TaskRegistry.add(
        "my_code",
        source=FileSource(Source({"train": ("gs://bucket/code/*.jsonl.zst",)}, "jsonl", fields={"path":
        "file"}, language="code")), preprocessors=[Prepare(CodeFormat(), FillInTheMiddle())],
        output_features={"targets": seqio.Feature(vocabulary_from("tokenizer.json"), add_eos=True)},
    )

Its tokens come out of `aurora data build`, not out of SeqIO's own pipeline, which would take token 0 for padding.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from aurora_jax.data.corpora.catalogue import MIXTURES, absolute, stated_rates, task_spec, task_specs
from aurora_jax.data.corpora.sample_tasks import sample_task
from aurora_jax.data.registry.vocabulary import Vocabulary
from aurora_jax.data.text.documents import Document, DocumentStep, Piece
from aurora_jax.data.text.readers import EXCERPT, Part
from aurora_jax.data.text.recipe import Preparation, Recipe, Tokenized, class_name, describe
from aurora_jax.data.text.sources import Bad, Source, TaskSpec
from aurora_jax.errors import InputError
from aurora_jax.storage.files import File, find

TOKENIZE, APPEND_EOS = seqio.preprocessors.tokenize, seqio.preprocessors.append_eos

EXAMPLE = {
    "targets": tf.TensorSpec((), tf.string),
    "language": tf.TensorSpec((), tf.string),
    "fields": tf.TensorSpec((), tf.string),
}
"""A document as SeqIO's pipeline sees it: its text, its language, and its other fields as JSON."""


class FileSource(seqio.DataSource):
    """A `Source` as a data source of SeqIO; examples are those of `EXAMPLE`. A bad record raises InputError there."""

    def __init__(self, source: Source):
        super().__init__(tuple(source.splits))
        self.source = source

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return [file.url for file in self.source.files(split)]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        files = self.source.files(split)
        if shard_info is not None:
            files = files[shard_info.index :: shard_info.num_shards]

        def documents() -> Iterator[Document]:
            for file in files:
                for part in self.source.parts(file):
                    for document in self.source.read(part):
                        if isinstance(document, Bad):
                            raise InputError(f"{document.where}: {document.reason}; mend or remove it")
                        yield document

        return _dataset(documents)


class Prepare:
    """The last preprocessor of a task: document steps, the tokenizer, and EOS if the feature `targets` has
    `add_eos`."""

    def __init__(self, *steps: DocumentStep):
        self.steps = steps

    def __call__(self, dataset: tf.data.Dataset, output_features: Any) -> tf.data.Dataset:
        feature = output_features["targets"]
        preparation = Preparation(self.steps, feature.vocabulary.tokenizer, feature.add_eos)

        def examples() -> Iterator[dict[str, Any]]:
            # One at a time: SeqIO repeats its datasets, and a batch of an endless one would never be full.
            for outcome in preparation.outcomes(map(_document, dataset.as_numpy_iterator()), batch_bytes=0):
                if isinstance(outcome, Bad):
                    raise InputError(f"{outcome.where}: {outcome.reason}; mend or remove it")
                if isinstance(outcome, Tokenized):
                    yield {"targets": outcome.ids, "language": outcome.language.encode()}

        signature = {"targets": tf.TensorSpec([None], tf.int32), "language": tf.TensorSpec((), tf.string)}
        return tf.data.Dataset.from_generator(examples, output_signature=signature)


class DatasetReader:
    """Reads what needs TensorFlow: any other data source of SeqIO, or a `Source` followed by preprocessors on
    tf.data datasets."""

    def __init__(self, source: seqio.DataSource, split: str, steps: Sequence[Callable[..., Any]]):
        self.source, self.split, self.steps = source, split, tuple(steps)

    def files(self, split: str) -> list[File]:
        if isinstance(self.source, FileSource):
            return self.source.source.files(split)
        shards = [str(shard) for shard in self.source.list_shards(split)]
        found = [file for shard in shards if "/" in shard for file in find(shard)]
        return found if len(found) == len(shards) else [File(shard, 1, 0) for shard in shards]

    def parts(self, file: File) -> list[Part]:
        return (
            self.source.source.parts(file)
            if isinstance(self.source, FileSource)
            else [Part(file.url, 0, -1, file.size)]
        )

    def read(self, part: Part) -> Iterator[Document | Bad]:
        bad: list[Bad] = []
        if isinstance(self.source, FileSource):
            source = self.source.source

            def documents() -> Iterator[Document]:
                for document in source.read(part):
                    if isinstance(document, Bad):
                        bad.append(document)
                    else:
                        yield document

            dataset = _dataset(documents)
        else:
            shards = [str(shard) for shard in self.source.list_shards(self.split)]
            place = seqio.ShardInfo(shards.index(part.url), len(shards))
            dataset = self.source.get_dataset(self.split, shuffle=False, shard_info=place)
        for step in self.steps:
            dataset = step(dataset)
        try:
            for number, example in enumerate(dataset.as_numpy_iterator()):
                yield from bad
                bad.clear()
                yield _document(example, f"{part.url}, example {number:,}")
        except tf.errors.OpError as error:
            raise InputError(f"{part.url}: the task's preprocessors failed: {error.message.splitlines()[0]}") from error
        yield from bad

    def described(self) -> tuple[Any, ...]:
        """What the fingerprint holds of it."""
        source = self.source
        own: Any = (
            source.source.described() if isinstance(source, FileSource) else repr(getattr(source, "tfds_dataset", ""))
        )
        return (*class_name(source), own, *map(describe, self.steps))


def _dataset(documents: Callable[[], Iterable[Document]]) -> tf.data.Dataset:
    def examples() -> Iterator[dict[str, bytes]]:
        for document in documents():
            # ASCII: fields may hold halves of surrogate pairs, which UTF-8 cannot.
            fields = json.dumps({**document.fields, "": document.where}, default=str)
            language = document.fields.get("language", "und")
            yield {"targets": document.text.encode(), "language": language.encode(), "fields": fields.encode()}

    return tf.data.Dataset.from_generator(examples, output_signature=EXAMPLE)


def _document(example: dict[str, Any], where: str = "") -> Document | Bad:
    """A document out of an example of SeqIO's pipeline."""
    if "targets" not in example:
        return Bad(where, "no feature 'targets'", repr(sorted(example))[:EXCERPT])
    fields = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in example.items()
        if name not in EXAMPLE
    }
    fields |= json.loads(example.get("fields", b"{}"))
    if "language" in example:
        fields["language"] = example["language"].decode()
    where = fields.pop("", where)
    try:
        return Document((Piece(example["targets"].decode()),), fields, where)
    except UnicodeDecodeError:
        return Bad(where, "not UTF-8", repr(example["targets"])[:EXCERPT])


def recipe_of(task_name: str, split: str) -> Recipe:
    """The recipe of a task that stands in SeqIO's registry; `Registry.recipe` knows ours with its own tokenizer.

    Its preprocessors must be steps on datasets (with no argument but the dataset), then `Prepare`, or SeqIO's
    `tokenize` and, if wanted, `append_eos`.

    Raises:
        InputError: no such task or split, other preprocessors, or a vocabulary that has no digest.
    """
    task = _registered_task(task_name)
    if split not in task.splits:
        raise InputError(f"task {task_name} has no split {split!r}; it has: {', '.join(task.splits)}")
    feature = task.output_features["targets"]
    if not isinstance(feature.vocabulary, Vocabulary):
        raise InputError(
            f"task {task_name}: its vocabulary, a {type(feature.vocabulary).__name__}, has no digest; make it "
            "with vocabulary_from(path)"
        )
    # The marker of SeqIO's own cache, which the store replaces, does nothing.
    steps = [step for step in task.preprocessors if not isinstance(step, seqio.CacheDatasetPlaceholder)]
    last = next(
        (place for place, step in enumerate(steps) if isinstance(step, Prepare) or step is TOKENIZE), len(steps)
    )
    before, after = steps[:last], steps[last:]
    if len(after) == 1 and isinstance(after[0], Prepare):
        document_steps, append_eos = after[0].steps, feature.add_eos
    elif after in ([TOKENIZE], [TOKENIZE, APPEND_EOS]):
        document_steps, append_eos = (), feature.add_eos and len(after) == 2
    else:
        raise InputError(
            f"task {task_name}: a token store needs preprocessors that end with Prepare(...), or with "
            "seqio.preprocessors.tokenize and, if "
            f"wanted, append_eos; these are {[getattr(step, '__name__', repr(step)) for step in steps]}"
        )
    for step in before:
        needed = [
            p.name
            for p in list(inspect.signature(step).parameters.values())[1:]
            if p.default is p.empty and p.kind < p.VAR_POSITIONAL
        ]
        if needed:
            raise InputError(
                f"task {task_name}: preprocessor {step} needs {', '.join(needed)}; bind them with functools.partial"
            )
    plain = isinstance(task.source, FileSource) and not before
    reader = task.source.source if plain else DatasetReader(task.source, split, before)
    return Recipe(task_name, split, reader, document_steps, feature.vocabulary.tokenizer, append_eos)


def _registered_task(name: str) -> seqio.Task:
    if name not in seqio.TaskRegistry.names():
        raise InputError(
            f"no SeqIO task is named {name!r}; registered are: "
            f"{', '.join(sorted(seqio.TaskRegistry.names())) or 'none'}"
        )
    return seqio.TaskRegistry.get(name)


def source_of(task: str) -> tuple[Source | None, str]:
    """Where a registered task's documents come from, if that is a source of ours, and the name of its class."""
    source = seqio.TaskRegistry.get(task).source
    return source.source if isinstance(source, FileSource) else None, type(source).__name__


def mixture_rates(mixture: str) -> tuple[tuple[str, float], ...]:
    """(task name, rate) of every task of a registered mixture, sub-mixtures resolved, by name; of one that is written
    out, `sample_fi=0.5,sample_en=0.25`, as it says. For a task: its own name at rate 1.

    Raises:
        InputError: no mixture or task has that name, or what is written out is malformed.
    """
    if (stated := stated_rates(mixture)) is not None:
        return stated
    try:
        provider = seqio.get_mixture_or_task(mixture)
    except ValueError as error:
        if sample_task("", mixture) is not None:  # of a language that the sample corpus does not have
            return ((mixture, 1.0),)
        raise InputError(str(error)) from error
    if isinstance(provider, seqio.Task):
        return ((provider.name, 1.0),)
    return tuple(sorted((task.name, float(provider.get_rate(task))) for task in provider.tasks))


@dataclass(frozen=True)
class Registry:
    """All tasks, with one tokenizer and one folder of sources for ours: a value, of which any number may be alive."""

    root: str
    """Folder of a sample corpus or of Aurora-M's sources; local, gs:// or s3://."""
    vocabulary: Vocabulary
    """Of our tasks; those that modules register with SeqIO have the one that the module gives them."""

    def recipe(self, task: str, split: str) -> Recipe:
        """The recipe of a task: ours, or one that stands in SeqIO's registry.

        Raises:
            InputError: see `recipe_of`.
        """
        spec = self._ours(task)
        if spec is None or split not in spec.source.splits:
            return recipe_of(task, split)
        return Recipe(task, split, spec.source, spec.steps, self.vocabulary.tokenizer, True)

    def splits(self, task: str) -> tuple[str, ...]:
        """The splits that a task has. Raises InputError if there is no such task."""
        spec = self._ours(task)
        return tuple(spec.source.splits) if spec is not None else tuple(_registered_task(task).splits)

    def _ours(self, task: str) -> TaskSpec | None:
        named_by_module = task in seqio.TaskRegistry.names() and task not in _in_seqio
        return None if named_by_module else task_spec(self.root, task)


_in_seqio: dict[str, tuple[str, str]] = {}
"""Our tasks in SeqIO's registry -> root and digest of the tokenizer with which they stand there."""


def register(root: str | Path, vocabulary: Vocabulary, modules: Sequence[str] = ()) -> Registry:
    """Our tasks with this tokenizer, and modules that register more with SeqIO, imported.

    SeqIO's own registry has room for one task of a name: there ours stand under their plain names, for modules that
    mix them with theirs and for SeqIO's own pipelines, as the newest call has them. What an earlier call has returned
    stays as it was. No file is touched: what is missing is said when a store is built.

    Args:
        root: the folder of a sample corpus or of Aurora-M's sources; local, gs:// or s3://.
        vocabulary: of our tasks.
        modules: names of Python modules that register tasks and mixtures of their own.

    Raises:
        InputError: a module cannot be imported.
    """
    registry = Registry(absolute(root), vocabulary)
    wanted = (registry.root, vocabulary.sha256)
    if wanted not in _in_seqio.values():
        if _in_seqio:
            for name in MIXTURES:
                seqio.MixtureRegistry.remove(name)
            for name in _in_seqio:
                seqio.TaskRegistry.remove(name)
        for spec in task_specs(registry.root):
            feature = seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)
            seqio.TaskRegistry.add(spec.name, FileSource(spec.source), {"targets": feature}, [Prepare(*spec.steps)])
            _in_seqio[spec.name] = wanted
        for name, rates in MIXTURES.items():
            seqio.MixtureRegistry.add(name, list(rates.items()))
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(
                f"{module}: the module with further tasks cannot be imported: {error}; is its folder on PYTHONPATH?"
            ) from error
    return registry
