"""Reading documents: JSON lines cut into ranges of bytes, so that a large file feeds many workers, and every document has a fixed name."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

# A range of a file is read, and its hooks called, by one worker at a time.
RANGE_BYTES = 1 << 21


@dataclass(frozen=True)
class FileRange:
    """The lines of a file that begin in [start, end), by bytes.

    Attributes:
      input: the name that the user gave to the file's pattern.
      path: where the file lies.
      name: what the file is called in keys and reports: its path below the fixed part of the pattern.
    """

    input: str
    path: str
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A document on its way through the filters.

    Attributes:
      key: where it comes from, input/file:offset; unique, and the order of the output.
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


@dataclass(frozen=True)
class BadLine:
    """A line that is no document: where it stands, why it is none, and what it holds."""

    key: str
    input: str
    reason: str
    line: str


class NotADocument(ValueError):
    """A line is not a document; the message says why."""


def ranges(input: str, path: str, name: str, size: int, splittable: bool) -> Iterator[FileRange]:
    """The ranges of a file of `size` bytes; one whole range where it cannot be read from the middle, as under compression."""
    if not splittable:
        yield FileRange(input, path, name, 0, 1 << 62)
        return
    for start in range(0, size, RANGE_BYTES):
        yield FileRange(input, path, name, start, min(start + RANGE_BYTES, size))


def read_range(file: FileRange, languages: Collection[str]) -> Iterator[Document | BadLine]:
    """The documents of a range, in order; lines that are none come as what they are."""
    from apache_beam.io.filesystems import FileSystems

    with FileSystems.open(file.path) as stream:
        position = file.start
        if position:
            # A line that began before the range belongs to the one before.
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while position < file.end and (line := stream.readline()):
            key = f"{file.input}/{file.name}:{position:015d}"
            position += len(line)
            try:
                yield parse(key, file.input, line, languages)
            except NotADocument as error:
                yield BadLine(key, file.input, str(error), line.rstrip(b"\r\n").decode("utf-8", "backslashreplace"))


def parse(key: str, input: str, line: bytes, languages: Collection[str]) -> Document:
    """The document of a line. `source` is the input's name where the line has none.

    Raises:
      NotADocument: the line is not a JSON object with a text and a language that there are thresholds for.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NotADocument(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise NotADocument(f"a JSON {type(record).__name__}, not an object")
    for field in ("text", "language"):
        if not isinstance(record.get(field), str) or not record[field].strip():
            raise NotADocument(f"has no string {field!r}")
    try:
        line.decode("utf-8")
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise NotADocument(f"not Unicode text ({error})") from None
    if record["language"] not in languages:
        raise NotADocument(f"there are no thresholds for language {record['language']!r}")
    return Document(key, record["language"], record["text"], {"source": input} | record)
