"""Documents for curation: records with a text and a language, each with a fixed name."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aurora_jax.data.text.readers import EXCERPT, Part
from aurora_jax.data.text.sources import Bad, Source

JSON_LINES = Source({}, "jsonl")


@dataclass(frozen=True)
class InputPart:
    """A part of an input file.

    Attributes:
      input: the name that the user gave to the file's pattern.
      name: what the file is called in keys and reports: its path below the fixed part of the pattern.
      part: where it is.
    """

    input: str
    name: str
    part: Part


@dataclass(frozen=True)
class CuratedDocument:
    """A document on its way through the filters.

    Attributes:
      key: where it comes from, input/file:place; unique, and the order of the output.
      language: a language of the thresholds.
      text: what is filtered, redacted and compared.
      record: the whole JSON object of its line, whose `text` is the text as it came.
    """

    key: str
    language: str
    text: str
    record: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of UTF-8 text."""
        return len(self.text.encode())


class NotADocument(ValueError):
    """A record is not a document; the message says why."""


def read_part(file: InputPart, languages: Collection[str]) -> Iterator[CuratedDocument | Bad]:
    """The documents of a part, in order; records that are none come as what they are, named by their key."""
    for place, _, record in JSON_LINES.records(file.part):
        key = f"{file.input}/{file.name}:{place:015d}"
        if isinstance(record, Bad):
            yield record._replace(where=key)
            continue
        try:
            yield parse(key, file.input, record, languages)
        except NotADocument as error:
            yield Bad(key, str(error), repr(record)[:EXCERPT])


def parse(key: str, input: str, record: Mapping[str, Any], languages: Collection[str]) -> CuratedDocument:
    """The document of a record. `source` is the input's name where the record has none.

    Raises:
      NotADocument: the record has no text, or no language that there are thresholds for.
    """
    for field in ("text", "language"):
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise NotADocument(f"has no string {field!r}")
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError:  # half a surrogate pair, which JSON can spell
        raise NotADocument("not UTF-8") from None
    if record["language"] not in languages:
        raise NotADocument(f"there are no thresholds for language {record['language']!r}")
    return CuratedDocument(key, record["language"], record["text"], {"source": input} | dict(record))
