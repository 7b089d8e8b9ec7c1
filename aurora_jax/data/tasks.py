"""SeqIO tasks and mixtures over a sample corpus (`aurora data sample DIR`).

    sample_{language}         DIR/train/{language}.jsonl; its validation split is DIR/heldout/{language}.jsonl
    sample_clean_{language}   DIR/clean/{language}.jsonl; the same validation split
    nano_base, nano_cap, nano_cat   the mixtures of `MIXTURES`

Each example has `targets` (int32 [tokens], one EOS at the end) and `language`. Use them through the token store: SeqIO's packing would take
token 0 for padding.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path

import seqio
import tensorflow as tf

from aurora_jax.data.vocabulary import Vocabulary
from aurora_jax.errors import InputError

LANGUAGES = ("en", "fi", "hi", "ja", "vi", "code")

# Rates are shares of the sequences. In CAP and CAT half of what is read is English and code, replayed so that they are not forgotten while
# the four new languages are learnt; at a sixth each, both rose by 4 % in bits per byte.
REPLAY = {"en": 0.28, "code": 0.24, "fi": 0.12, "hi": 0.12, "ja": 0.12, "vi": 0.12}
MIXTURES: Mapping[str, Mapping[str, float]] = {
    "nano_base": {"sample_en": 1 / 2, "sample_code": 1 / 2},
    "nano_cap": {f"sample_{language}": rate for language, rate in REPLAY.items()},
    "nano_cat": {f"sample_clean_{language}": rate for language, rate in REPLAY.items()},
}

_registered: tuple[str, str] | None = None  # corpus folder and tokenizer digest of the tasks that are in SeqIO's registry


class JsonLinesSource(seqio.FileDataSource):
    """Documents of JSON-lines files: one object a line with the strings `text` and (optional) `language`; blank lines are errors.

    Examples are {"targets": text, "language": language or "und"}, string scalars. A malformed line stops the reader with an `InputError`
    that names file and line (inside TensorFlow's own error: see `input_error_in`).
    """

    def __init__(self, split_to_files: Mapping[str, str]):
        super().__init__(_read_json_lines, split_to_filepattern=split_to_files, cycle_length=1, block_length=1)

    @functools.cache  # noqa: B019 - sources live as long as the registry
    def num_input_examples(self, split: str) -> int:
        """Lines of the split; reads its files once."""
        return sum(1 for path in self.list_shards(split) for _ in tf.io.gfile.GFile(path, "rb"))


def _read_json_lines(path: tf.Tensor) -> tf.data.Dataset:
    return tf.data.TextLineDataset(path).enumerate(start=1).map(functools.partial(_parse_line, path))


def _parse_line(path: tf.Tensor, number: tf.Tensor, line: tf.Tensor) -> dict[str, tf.Tensor]:
    text, language = tf.numpy_function(_parse, [path, number, line], [tf.string, tf.string], stateful=False)
    return {"targets": tf.ensure_shape(text, []), "language": tf.ensure_shape(language, [])}


def _parse(path: bytes, number: int, line: bytes) -> tuple[bytes, bytes]:
    try:
        document = json.loads(line)
        return document["text"].encode(), document.get("language", "und").encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"{path.decode()}, line {number}"
        raise InputError(
            f'{where}: not a JSON object with the strings "text" and "language" ({type(error).__name__}: {error}); mend or remove the line'
        ) from error


def register_sample_tasks(corpus_dir: str | Path, vocabulary: Vocabulary) -> None:
    """Registers the tasks and mixtures of this module with SeqIO. The same corpus and tokenizer again: nothing to do.

    Raises:
        InputError: a file of the corpus is missing, or the names are taken by another corpus or tokenizer.
    """
    global _registered
    corpus_dir = Path(corpus_dir).absolute()
    wanted = (str(corpus_dir), vocabulary.sha256)
    if _registered == wanted:
        return
    if _registered is not None:
        raise InputError(
            f"the sample tasks are already registered for corpus {_registered[0]} with tokenizer {_registered[1][:12]}, "
            f"not for corpus {wanted[0]} with tokenizer {wanted[1][:12]}; a process works with one of them: unregister_sample_tasks() first"
        )
    missing = [
        path
        for language in LANGUAGES
        for part in ("train", "clean", "heldout")
        if not (path := corpus_dir / part / f"{language}.jsonl").is_file()
    ]
    if missing:
        raise InputError(
            f"{corpus_dir}: not a complete sample corpus, {missing[0]} is missing; make it with `aurora data sample {corpus_dir}`"
        )

    for prefix, part in (("sample", "train"), ("sample_clean", "clean")):
        for language in LANGUAGES:
            seqio.TaskRegistry.add(
                f"{prefix}_{language}",
                source=JsonLinesSource(
                    {
                        split: os.fspath(corpus_dir / name / f"{language}.jsonl")
                        for split, name in (("train", part), ("validation", "heldout"))
                    }
                ),
                preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
                output_features={"targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)},
            )
    for name, rates in MIXTURES.items():
        seqio.MixtureRegistry.add(name, list(rates.items()))
    _registered = wanted


def unregister_sample_tasks() -> None:
    """Takes the tasks and mixtures of `register_sample_tasks` out of SeqIO's registry again."""
    global _registered
    if _registered is None:
        return
    for name in MIXTURES:
        seqio.MixtureRegistry.remove(name)
    for language in LANGUAGES:
        seqio.TaskRegistry.remove(f"sample_{language}")
        seqio.TaskRegistry.remove(f"sample_clean_{language}")
    _registered = None


def mixture_rates(mixture_name: str) -> tuple[tuple[str, float], ...]:
    """(task name, rate) of every task of a registered mixture, sub-mixtures resolved, by name. For a task: its own name at rate 1.

    Raises:
        InputError: no mixture or task has that name.
    """
    try:
        provider = seqio.get_mixture_or_task(mixture_name)
    except ValueError as error:
        raise InputError(str(error)) from error
    if isinstance(provider, seqio.Task):
        return ((provider.name, 1.0),)
    return tuple(sorted((task.name, float(provider.get_rate(task))) for task in provider.tasks))


def input_error_in(error: tf.errors.OpError) -> InputError | None:
    """The `InputError` that Python code raised inside a tf.data pipeline, dug out of TensorFlow's message; None if there is none."""
    for line in str(error).splitlines():
        _, found, message = line.partition(f"{InputError.__name__}: ")
        if found:
            return InputError(message)
    return None
