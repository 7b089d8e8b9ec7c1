"""Sources: files of documents, read in parts by many workers, without TensorFlow.

A source finds its files, divides them into parts (a stretch of bytes, rows or records), and reads a part as
documents. What cannot be read comes out as `Bad`, with the reason, and stops nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from aurora_jax.data.text.documents import Document, DocumentStep, Piece
from aurora_jax.data.text.readers import EXCERPT, READERS, Part, Unreadable
from aurora_jax.errors import InputError
from aurora_jax.storage.files import File, find_all

Format = Literal["jsonl", "json", "parquet", "arrow", "array_record", "tfrecord", "lines", "text"]
Kind = Literal["web", "code", "encyclopedia", "instruction", "safety", "domain"]

LONGEST = 32 << 20


class Bad(NamedTuple):
    """A record that could not be used: where it is, why (a few words that can be counted), and how it begins."""

    where: str
    reason: str
    excerpt: str


class Record(NamedTuple):
    """A record as its format holds it: its place in the file (a byte, a line, a row), that place in words,
    and what is there."""

    place: int
    where: str
    content: Mapping[str, Any] | Bad


@dataclass(frozen=True)
class Source:
    """Files of documents, by split.

    Raises:
        InputError: the format is unknown.
    """

    splits: Mapping[str, tuple[str, ...]]
    """Glob patterns of each split; local, gs:// or s3://."""
    format: Format
    """jsonl: an object a line, plain, .gz or .zst. json: one array of objects. parquet. arrow: a Hugging Face
    dataset saved on disk (its data-*.arrow files). array_record, tfrecord: records that are tf.train.Examples
    (as TFDS writes them) or JSON objects. lines: a document a line. text: a document a file; its field `path`
    is the file's
    address."""
    text: str | None = "text"
    """Field that holds the text; None where a step makes the text of other fields."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Further fields of the documents: their name for the steps -> their name in the records; `meta.stars` goes
    inward. A record that lacks one simply does not have it."""
    language: str = "und"
    """Of all documents; a record's own is used where `fields` names one called `language`."""
    license: str = "unknown"
    """Of the source, as its publisher states it."""
    longest: int = LONGEST
    """Documents of more bytes are bad: a file that is not what it should be, more often than a text."""

    def __post_init__(self) -> None:
        if self.format not in READERS:
            raise InputError(f"format {self.format!r} is none of {', '.join(READERS)}")

    def files(self, split: str) -> list[File]:
        """The files of a split that are there, in the order of their patterns.

        Raises:
            InputError: a file system cannot be reached, or two patterns, or two names, lead to one file,
                which would be read twice.
        """
        return find_all(self.splits[split])

    def parts(self, file: File) -> list[Part]:
        """A file, divided. The same for the same file on every machine."""
        return READERS[self.format].parts(file)

    def records(self, part: Part) -> Iterator[Record]:
        """The records of a part, in order; of tables only the columns that are asked for. Raises InputError
        if the file cannot be read."""
        reader = READERS[self.format]
        unit = reader.unit(part.url)
        for place, content in reader.records(part, self._wanted):
            where = f"{part.url}, {unit} {place:,}" if unit else part.url
            yield Record(place, where, Bad(where, *content) if isinstance(content, Unreadable) else content)

    def read(self, part: Part) -> Iterator[Document | Bad]:
        """The documents of a part, in order. Raises InputError if the file as a whole cannot be read."""
        for _, where, content in self.records(part):
            yield content if isinstance(content, Bad) else self._document(where, content)

    @property
    def _wanted(self) -> frozenset[str]:
        """The fields of records that documents are made of, as paths."""
        return frozenset((*([self.text] if self.text else []), *self.fields.values()))

    def described(self) -> tuple[Any, ...]:
        """What the fingerprint holds of it: all but where the files are and how they are licensed."""
        return (self.format, self.text, sorted(self.fields.items()), self.language, self.longest)

    def _document(self, where: str, record: Mapping[str, Any]) -> Document | Bad:
        fields: dict[str, Any] = {"language": self.language}
        for name, path in self.fields.items():
            try:
                fields[name] = _inward(record, path)
            except (KeyError, TypeError):
                continue
        language = fields["language"]
        if not (isinstance(language, str) and language and language.isprintable()):  # reports count by it
            fields["language"] = self.language
        if self.text is None:
            return Document((), fields, where)
        try:
            text = _inward(record, self.text)
        except (KeyError, TypeError):
            return Bad(where, f"no field {self.text!r}", repr(record)[:EXCERPT])
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError:
                return Bad(where, "not UTF-8", repr(text[:EXCERPT]))
        if not isinstance(text, str):
            return Bad(where, f"field {self.text!r} is no string", repr(text)[:EXCERPT])
        try:
            size = len(text.encode())
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
            return Bad(where, "not UTF-8", ascii(text[:EXCERPT]))
        if size > self.longest:
            return Bad(where, f"longer than {self.longest:,} bytes", text[:EXCERPT])
        return Document((Piece(text),), fields, where)


def _inward(record: Mapping[str, Any], path: str) -> Any:
    value: Any = record
    for name in [path] if path in record else path.split("."):
        value = value[name]
    return value


@dataclass(frozen=True)
class TaskSpec:
    """A task before it stands in SeqIO's registry: `tasks.register` puts it there with a tokenizer."""

    name: str
    source: Source
    steps: tuple[DocumentStep, ...] = ()
    kind: Kind | None = None
    """What sort of text it is; `aurora data describe` adds up shares by it."""
    stages: tuple[str, ...] = ()
    """Stages of Aurora-M that it is for."""
    origin: str = ""
    """Where the files come from: a data set of the Hugging Face hub, or an address."""
    note: str = ""
    """What a user should know of it: what is from memory, what is our choice."""
