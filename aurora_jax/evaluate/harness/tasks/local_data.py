"""Data of the tasks beside this file, read from a folder of the user's: `aurora eval --task-data DIR`.

The harness calls these with a task's metadata, which `data` is part of, and looks for them beside its task files.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from aurora_jax.errors import InputError


def _file(metadata: dict[str, Any], name: str) -> Path:
    folder = metadata.get("data")
    if folder is None:
        raise InputError(f"{name} is needed: name the folder that has it with --task-data.")
    path = Path(folder) / name
    if not path.is_file():
        raise InputError(f"{path}: no such file; --task-data names the folder that has it.")
    return path


def _records(name: str, split: str, read: Callable[[Path], Iterator[dict[str, Any]]]) -> Callable[..., dict]:
    def load(**metadata: Any) -> dict[str, datasets.Dataset]:
        path = _file(metadata, name)
        try:
            records = list(read(path))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{path}: not the records that the task reads: {error!r}") from error
        return {split: datasets.Dataset.from_list(records)}

    return load


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


def _common_sense(path: Path) -> Iterator[dict[str, Any]]:
    for record in _json_lines(path):
        yield {**record, "choices": [record[f"choice{number}"] for number in range(5)]}


def _mathematics(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        for question, answer in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield {"question": question, "answer": answer.replace(",", "")}


def _winograd(language: str) -> Callable[[Path], Iterator[dict[str, Any]]]:
    def read(path: Path) -> Iterator[dict[str, Any]]:
        for line in path.read_text("utf-8").split("\n"):
            if not line.strip():
                continue
            tag, _, _, sentence, words, pronoun, candidates = line.split("\t")
            if tag != language:
                continue
            said, (first, _), _ = json.loads(pronoun)
            begin = _place(sentence, json.loads(words), first, said)
            end = begin + len(said)
            named = json.loads(candidates)
            if len(named) != 2:
                continue
            yield {
                "contexts": [sentence[:begin] + candidate[0] for candidate in named],
                "rest": sentence[end:].strip(),
                "label": [candidate[3] for candidate in named].index(True),
            }

    return read


def _place(sentence: str, words: list[str], first: int, said: str) -> int:
    """Where a pronoun stands. The words are the sentence's, but for spaces and the spelling of quotation marks: of the
    places that have the pronoun, the one next to where the words before it end."""
    shown = [place for place, character in enumerate(sentence) if not character.isspace()]
    near = shown[min(len("".join(words[:first]).replace(" ", "")), len(shown) - 1)]
    places = [place for place in range(len(sentence)) if sentence.startswith(said, place)]
    return min(places, key=lambda place: abs(place - near))


xcopa_vi = _records("xcopa_vi_validation.jsonl", "validation", _json_lines)
jcommonsenseqa = _records("jcommonsenseqa_validation.json", "validation", _common_sense)
mgsm_en = _records("mgsm_en.tsv", "test", _mathematics)
mgsm_ja = _records("mgsm_ja.tsv", "test", _mathematics)
winograd_en = _records("crosslingual_winograd.tsv", "test", _winograd("en"))
winograd_jp = _records("crosslingual_winograd.tsv", "test", _winograd("jp"))


def xcopa_text(doc: dict[str, Any]) -> str:
    """As the harness's own xcopa_vi."""
    connector = {"cause": "bởi vì", "effect": "vì vậy"}[doc["question"]]
    return f"{doc['premise'].strip()[:-1]} {connector}"


def xcopa_choices(doc: dict[str, Any]) -> list[str]:
    """As the harness's own xcopa_vi: they go on with a sentence."""
    return [doc[name][0].lower() + doc[name][1:] for name in ("choice1", "choice2")]
