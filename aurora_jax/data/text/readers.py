"""Formats of files: how each is divided into parts, and what a part's records are. Without TensorFlow, but
for TFRecord."""

import io
import os
import tempfile
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow

from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines
from aurora_jax.storage.files import Compression, File, open_file, open_stream

PART_BYTES = 16 << 20


EXCERPT = 200


TFRECORD_FRAME = 16  # bytes about a record: its length and two checksums


COMPRESSION: Mapping[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


class Part(NamedTuple):
    """A stretch [start, stop) of a file: bytes of JSON lines and lines, row groups of Parquet, records of
    ArrayRecord; else the whole file.

    `stop` is -1 for the end. `weight` is its share of the file in bytes, for progress.
    """

    url: str
    start: int
    stop: int
    weight: int


class Unreadable(NamedTuple):
    """What a reader makes of a record that it cannot read: why, and how it begins."""

    reason: str
    excerpt: str


Records = Iterator[tuple[int, Mapping[str, Any] | Unreadable]]


class _Reader(ABC):
    """A format: how a file is divided, and the (place, content) of a part's records. A file is one part
    unless a format says more."""

    @classmethod
    def unit(cls, url: str) -> str:
        """What places count."""
        return "record"

    @classmethod
    def parts(cls, file: File) -> list[Part]:
        return [Part(file.url, 0, -1, file.size)]

    @classmethod
    @abstractmethod
    def records(cls, part: Part, wanted: Collection[str]) -> Records:
        """The records of a part; of tables only the columns that `wanted` names, where dots go inward."""


def _divided(file: File, count: int) -> list[Part]:
    """Parts of about PART_BYTES, of a file that holds `count` things of like size."""
    at_once = max(1, count * PART_BYTES // file.size)
    return [
        Part(file.url, start, min(start + at_once, count), file.size * at_once // count)
        for start in range(0, count, at_once)
    ]


class _Lines(_Reader):
    """Files of lines, cut at bytes: a part has the lines that begin in it. Compressed files are one part."""

    @classmethod
    def unit(cls, url: str) -> str:
        return "line" if _compression(url) else "byte"

    @classmethod
    def parts(cls, file: File) -> list[Part]:
        if _compression(file.url):
            return super().parts(file)
        cuts = [*range(0, file.size, PART_BYTES), file.size]
        return [Part(file.url, start, stop, stop - start) for start, stop in pairwise(cuts)]

    @classmethod
    def records(cls, part: Part, wanted: Collection[str]) -> Records:
        first = True
        for place, line in _lines(part):
            yield place, cls.parse(line.removeprefix(BOM_UTF8) if first and part.start == 0 else line)
            first = False

    @staticmethod
    def parse(line: bytes) -> Mapping[str, Any] | Unreadable:
        return {"text": line.removesuffix(b"\n").removesuffix(b"\r")}


class _JsonLines(_Lines):
    @staticmethod
    def parse(line: bytes) -> Mapping[str, Any] | Unreadable:
        return _parse_json(line)


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """(line number or byte, line) of a part."""
    compression = _compression(part.url)
    if compression:
        with _whole(part.url), io.BufferedReader(open_stream(part.url, compression), 1 << 20) as stream:
            yield from enumerate(stream, start=1)
        return
    with _whole(part.url), io.BufferedReader(open_file(part.url), 1 << 20) as file:
        place = part.start
        if place:
            # The line that begins before the part belongs to the one before it.
            file.seek(place - 1)
            place += len(file.readline()) - 1
        while place < part.stop and (line := file.readline()):
            yield place, line
            place += len(line)


def _parse_json(line: bytes) -> Mapping[str, Any] | Unreadable:
    try:
        return json_lines.object_of(line)
    except json_lines.BadLine as error:
        return Unreadable(error.reason, repr(line[:EXCERPT]))


class _Json(_Reader):
    """An array of objects: read whole, so for files that fit into memory."""

    @classmethod
    def records(cls, part: Part, wanted: Collection[str]) -> Records:
        with _whole(part.url):
            with open_stream(part.url, _compression(part.url)) as stream:
                records = json_lines.value_of(stream.read())
            if not isinstance(records, list):
                raise ValueError("not an array of objects")
        for number, record in enumerate(records):
            yield (
                number,
                record if isinstance(record, dict) else Unreadable(json_lines.NOT_AN_OBJECT, repr(record)[:EXCERPT]),
            )


class _Text(_Reader):
    @classmethod
    def unit(cls, url: str) -> str:
        return ""

    @classmethod
    def records(cls, part: Part, wanted: Collection[str]) -> Records:
        with _whole(part.url), open_stream(part.url, _compression(part.url)) as stream:
            yield 0, {"text": stream.read().removeprefix(BOM_UTF8), "path": part.url}


class _Parquet(_Reader):
    @classmethod
    def unit(cls, url: str) -> str:
        return "row"

    @classmethod
    def parts(cls, file: File) -> list[Part]:
        if file.size <= PART_BYTES:
            return super().parts(file)
        from pyarrow import parquet

        with _whole(file.url), open_file(file.url) as opened:
            return _divided(file, parquet.ParquetFile(opened).metadata.num_row_groups)

    @classmethod
    def records(cls, part: Part, wanted: Collection[str]) -> Records:
        from pyarrow import parquet

        with _whole(part.url), open_file(part.url) as opened:
            file = parquet.ParquetFile(opened)
            groups = range(part.start, file.metadata.num_row_groups if part.stop < 0 else part.stop)
            row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
            for batch in file.iter_batches(row_groups=list(groups), columns=sorted(wanted)):
                yield from enumerate(_rows(batch), start=row)
                row += len(batch)


class _Arrow(_Reader):
    @classmethod
    def unit(cls, url: str) -> str:
        return "row"

    @classmethod
    def records(cls, part: Part, wanted: Collection[str]) -> Records:
        from pyarrow import ipc

        row = 0
        with _whole(part.url), open_stream(part.url) as stream:
            for batch in ipc.open_stream(stream):
                yield from enumerate(_rows(_only(batch, wanted)), start=row)
                row += len(batch)


def _only(batch: pyarrow.RecordBatch, wanted: Collection[str]) -> pyarrow.RecordBatch:
    """The columns of a batch that are asked for, and of nested ones the fields that are."""
    kept = {
        field.name: only for field in batch.schema if (only := _wanted_type(field.name, field.type, wanted)) is not None
    }
    if not kept:  # its rows, without columns
        return pyarrow.RecordBatch.from_struct_array(pyarrow.array([{}] * len(batch), pyarrow.struct([])))
    return batch.select(list(kept)).cast(pyarrow.schema(list(kept.items())))


def _wanted_type(path: str, type: pyarrow.DataType, wanted: Collection[str]) -> pyarrow.DataType | None:
    """A column's type, less the nested fields that are not asked for; None for none of it."""
    if path in wanted or not pyarrow.types.is_struct(type):
        return type if path in wanted else None
    inner = [(field.name, _wanted_type(f"{path}.{field.name}", field.type, wanted)) for field in type]
    kept = [(name, only) for name, only in inner if only is not None]
    return pyarrow.struct(kept) if kept else None


def _rows(batch: pyarrow.RecordBatch) -> list[Mapping[str, Any] | Unreadable]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError too
        if len(batch) > 1:  # one row of it; the others are good
            return [row for number in range(len(batch)) for row in _rows(batch.slice(number, 1))]
        if isinstance(error, UnicodeDecodeError):
            return [Unreadable("not UTF-8", repr(error.object[:EXCERPT]))]
        return [Unreadable("a value that Python has no type for", str(error)[:EXCERPT])]


class _ArrayRecord(_Reader):
    AT_ONCE = 256

    @classmethod
    def parts(cls, file: File) -> list[Part]:
        if file.size <= PART_BYTES:
            return super().parts(file)
        with cls._opened(file.url) as reader:
            return _divided(file, reader.num_records())

    @classmethod
    def records(cls, part: Part, wanted: Collection[str]) -> Records:
        with cls._opened(part.url) as reader:
            stop = reader.num_records() if part.stop < 0 else part.stop
            for first in range(part.start, stop, cls.AT_ONCE):
                numbers = list(range(first, min(first + cls.AT_ONCE, stop)))
                yield from zip(numbers, map(_parse_record, reader.read(numbers)), strict=True)

    @staticmethod
    @contextmanager
    def _opened(url: str) -> Iterator[Any]:
        from array_record.python.array_record_module import ArrayRecordReader

        with _local(url) as path, _whole(url):
            reader = ArrayRecordReader(path)
            try:
                yield reader
            finally:
                reader.close()


class _TFRecord(_Reader):
    @classmethod
    def records(cls, part: Part, wanted: Collection[str]) -> Records:
        from aurora_jax.data.text.tfrecord import contents

        # TensorFlow takes a file that is cut short in a record's head, and most that gzip cut short, for one
        # that ends there.
        with _whole(part.url), _local(part.url, _compression(part.url)) as path:
            read = 0
            for number, content in enumerate(contents(path, part.url)):
                yield number, _parse_record(content)
                read += len(content) + TFRECORD_FRAME
            if read != os.path.getsize(path):
                raise InputError(f"{part.url}: a damaged TFRecord file: it ends within a record")


def _parse_record(content: bytes) -> Mapping[str, Any] | Unreadable:
    """A tf.train.Example (whose first byte is the tag 0x0A) or a JSON object."""
    if content[:1] == b"{":
        return _parse_json(content)
    from aurora_jax.data.text.tfrecord import example_of

    example = example_of(content)
    if example is None:
        return Unreadable("neither a tf.train.Example nor JSON", repr(content[:EXCERPT]))
    return {name: _as_text(value) for name, value in example.items()}


def _as_text(value: Any) -> Any:
    """Bytes as text where they are; the text field keeps bytes that are not UTF-8, to be named as such."""
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


READERS: Mapping[str, type[_Reader]] = {
    "jsonl": _JsonLines,
    "json": _Json,
    "lines": _Lines,
    "text": _Text,
    "parquet": _Parquet,
    "arrow": _Arrow,
    "array_record": _ArrayRecord,
    "tfrecord": _TFRecord,
}


def _compression(url: str) -> Compression | None:
    return next((name for suffix, name in COMPRESSION.items() if url.endswith(suffix)), None)


@contextmanager
def _whole(url: str) -> Iterator[None]:
    """A file that ends early or is something else: said of the file."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, pyarrow.ArrowException) as error:
        raise InputError(f"{url}: truncated, or not of its format: {error}") from error


@contextmanager
def _local(url: str, compression: Compression | None = None) -> Iterator[str]:
    """A path for libraries that read local, uncompressed files only: the file's own, or a copy's."""
    if "://" not in url and not compression:
        yield url
        return
    with tempfile.NamedTemporaryFile() as copy, open_stream(url, compression) as stream:
        while block := stream.read(1 << 22):
            copy.write(block)
        copy.flush()
        yield copy.name
