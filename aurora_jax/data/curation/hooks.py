"""What the user brings along: word lists, fastText models, and classifiers of any kind."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aurora_jax.data.curation.units import normalize, split_units
from aurora_jax.errors import InputError

Scorer = Callable[[list[str]], Sequence[float]]


@dataclass(frozen=True)
class Hook:
    """A filter by a score: documents stay where minimum <= score <= maximum.

    Attributes:
      name: the filter's name in the report.
      target: "module:function" with list[str] -> list[float], or the path of a fastText model.
      label: the fastText label whose probability is the score; None for a function.
      language: the only language whose documents are scored; None for all.
      minimum, maximum: the limits of the score.
    """

    name: str
    target: str
    label: str | None = None
    language: str | None = None
    minimum: float = -math.inf
    maximum: float = math.inf

    def load(self) -> Scorer:
        """The function itself, or that of the fastText model; loaded once a process.

        Raises:
          InputError: the function cannot be imported, or the model not be loaded, or fastText is not installed.
        """
        return _fasttext(self.target, self.label) if self.label is not None else _function(self.target)

    def scores(self, texts: list[str]) -> list[float]:
        """The score of each text.

        Raises:
          InputError: there is another number of scores than of texts.
        """
        scores = [float(score) for score in self.load()(texts)]
        if len(scores) != len(texts):
            raise InputError(
                f"{self.target} gave {len(scores)} scores for {len(texts)} texts; it must give one for each."
            )
        return scores


def parse_classifier(specification: str) -> Hook:
    """A hook from NAME=MODULE:FUNCTION,min=NUMBER or ...,max=NUMBER (both may stand); `language=xx` limits it
    to one language.

    Raises:
      InputError: it is not written so.
    """
    form = "NAME=MODULE:FUNCTION,max=NUMBER"
    name, target, options = _parse(specification, form, {"min", "max", "language"})
    if ":" not in target:
        raise InputError(f"{specification}: a classifier is {form}, such as toxicity=my_scorers:toxicity,max=0.8.")
    minimum, maximum = _limits(specification, options, form)
    return Hook(name, target, None, options.get("language"), minimum, maximum)


def parse_quality(specification: str) -> Hook:
    """A hook from LANGUAGE=MODEL.bin,label=LABEL,min=NUMBER; the score is fastText's probability of the label.

    Raises:
      InputError: it is not written so, or there is no such model.
    """
    form = "LANGUAGE=MODEL.bin,label=LABEL,min=NUMBER"
    language, target, options = _parse(specification, form, {"min", "max", "label"})
    if "label" not in options:
        raise InputError(f"{specification}: a quality filter is {form}; the label is missing.")
    if not Path(target).is_file():
        raise InputError(f"{target}: no such fastText model.")
    minimum, maximum = _limits(specification, options, form)
    return Hook("quality", target, options["label"], language, minimum, maximum)


def _parse(specification: str, form: str, allowed: set[str]) -> tuple[str, str, dict[str, str]]:
    name, _, rest = specification.partition("=")
    target, *options = rest.split(",")
    pairs = dict(option.partition("=")[::2] for option in options)
    if not name or not target or not all(pairs.values()) or not set(pairs) <= allowed:
        raise InputError(f"{specification}: must be written {form}.")
    return name, target, pairs


def _limits(specification: str, options: dict[str, str], form: str) -> tuple[float, float]:
    if not {"min", "max"} & set(options):
        raise InputError(f"{specification}: min or max is missing; must be written {form}.")
    try:
        return float(options.get("min", -math.inf)), float(options.get("max", math.inf))
    except ValueError as error:
        raise InputError(f"{specification}: {error}; must be written {form}.") from None


@functools.cache
def _function(target: str) -> Scorer:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{target}: the classifier cannot be loaded ({error}); its module must be importable from here."
        ) from None


@functools.cache
def _fasttext(path: str, label: str) -> Scorer:
    try:
        import fasttext
    except ImportError:
        raise InputError(f"{path}: a fastText model needs fastText; `pip install fasttext-community`.") from None
    try:
        model = fasttext.load_model(path)
    except ValueError as error:
        raise InputError(f"{path}: not a fastText model ({error}).") from None
    if label not in model.get_labels():
        raise InputError(
            f"{path}: the model has no label {label!r}; it has {', '.join(sorted(model.get_labels())[:10])}."
        )

    def score(texts: list[str]) -> list[float]:
        # The binding's own method: the wrapper around it builds arrays in a way that numpy 2 refuses.
        predictions = (model.f.predict(f"{' '.join(text.split())}\n", -1, 0.0, "strict") for text in texts)
        return [next(probability for probability, name in prediction if name == label) for prediction in predictions]

    return score


def load_word_lists(directory: Path | None) -> dict[str, frozenset[str]]:
    """Language -> flagged words and phrases, from DIRECTORY/{language}.txt: one a line, `#` begins a comment.

    Raises:
      InputError: there is no such folder, or it holds no list.
    """
    if directory is None:
        return {}
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder of word lists; it holds one file a language, such as en.txt.")
    lists = {}
    for path in sorted(directory.glob("*.txt")):
        try:
            lines = [line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: a word list is UTF-8 text ({error}).") from None
        lists[path.stem] = frozenset(" ".join(split_units(normalize(line))) for line in lines) - {""}
    if not lists:
        raise InputError(f"{directory}: holds no word lists; they are named after languages, such as en.txt.")
    return lists
