"""Sources: files that the formats' own libraries wrote are read back, whole or in parts, and what is damaged
is named."""

import glob
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from aurora_jax.data.build.stores import build_stores
from aurora_jax.data.text import readers
from aurora_jax.data.text.documents import CodeFormat, Document
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.data.text.sources import Bad, Source
from aurora_jax.data.text.tokenizer import ByteTokenizer
from aurora_jax.errors import InputError
from aurora_jax.storage.files import find, open_file, open_stream

RECORDS = [
    {
        "text": f"{number}: ihmiset 日本語 𝒳 हिन्दी\n\ttoinen rivi\r\n",
        "language": "fi",
        "path": f"src/{number}.py",
        "meta": {"stars": number},
    }
    for number in range(60)
]
FIELDS = {"language": "language", "path": "path", "stars": "meta.stars", "absent": "meta.absent"}


def read(source: Source) -> list[Document | Bad]:
    return [record for file in source.files("train") for part in source.parts(file) for record in source.read(part)]


def source_of(path: Path | str, **more: Any) -> Source:
    """A source of one file, its format by its name unless given."""
    names = {"zst": "jsonl", "gz": "jsonl", "txt": "lines"}
    suffix = str(path).removesuffix(".gz").rsplit(".", 1)[-1]
    return Source({"train": (str(path),)}, **{"format": names.get(suffix, suffix)} | more)


def bad_of(records: Sequence[Document | Bad]) -> list[Bad]:
    return [record for record in records if isinstance(record, Bad)]


def texts(records: Sequence[Document | Bad]) -> list[str]:
    assert not bad_of(records)
    return [record.text for record in records if isinstance(record, Document)]


# ---------------------------------------------------------------- Every format


def json_lines(records: Sequence[dict]) -> bytes:
    return b"".join(
        json.dumps(record, ensure_ascii=number % 2 == 0).encode() + b"\n" for number, record in enumerate(records)
    )


def example(record: dict) -> bytes:
    import tensorflow as tf

    def feature(value: str | int) -> tf.train.Feature:
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))

    flat = {name: value for name, value in record.items() if name != "meta"} | {"meta.stars": record["meta"]["stars"]}
    return tf.train.Example(
        features=tf.train.Features(feature={name: feature(value) for name, value in flat.items()})
    ).SerializeToString()


def json_record(record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def write_tfrecord(path: Path, contents: Sequence[bytes]) -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path), "GZIP" if path.suffix == ".gz" else "") as writer:
        for content in contents:
            writer.write(content)


def write_array_record(path: Path, contents: Sequence[bytes], options: str = "group_size:1") -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), options)
    for content in contents:
        writer.write(content)
    writer.close()


def write_arrow(path: Path, records: Sequence[dict]) -> None:
    table = pa.Table.from_pylist(list(records))
    with ipc.new_stream(
        str(path), table.schema.with_metadata({"huggingface": json.dumps({"info": {"features": {}}})})
    ) as writer:
        writer.write_table(table, max_chunksize=7)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": lambda path: path.write_bytes(json_lines(RECORDS)) and None,
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(json_lines(RECORDS))) and None,
    "several-members.jsonl.gz": lambda path: (
        path.write_bytes(
            gzip.compress(json_lines(RECORDS[:20])) + gzip.compress(b"") + gzip.compress(json_lines(RECORDS[20:]))
        )
        and None
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(pa.compress(json_lines(RECORDS), "zstd", asbytes=True)) and None,
    "several-frames.jsonl.zst": lambda path: (
        path.write_bytes(
            b"".join(pa.compress(json_lines(part), "zstd", asbytes=True) for part in (RECORDS[:20], RECORDS[20:]))
        )
        and None
    ),
    "a.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(RECORDS), path),
    "groups.parquet": lambda path: parquet.write_table(
        pa.Table.from_pylist(RECORDS), path, row_group_size=7, compression="zstd"
    ),
    "bytes.parquet": lambda path: parquet.write_table(
        pa.Table.from_pylist([record | {"text": record["text"].encode()} for record in RECORDS]), path
    ),
    "a.arrow": lambda path: write_arrow(path, RECORDS),
    "examples.array_record": lambda path: write_array_record(path, list(map(example, RECORDS))),
    "json.array_record": lambda path: write_array_record(path, list(map(json_record, RECORDS)), "group_size:8,zstd"),
    "examples.tfrecord": lambda path: write_tfrecord(path, list(map(example, RECORDS))),
    "json.tfrecord": lambda path: write_tfrecord(path, list(map(json_record, RECORDS))),
    "examples.tfrecord.gz": lambda path: write_tfrecord(path, list(map(example, RECORDS))),
}


@pytest.mark.parametrize("part_bytes", [300, 1 << 24])
@pytest.mark.parametrize("name", WRITERS)
def test_what_a_library_wrote_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part_bytes: int
) -> None:
    """Every record once, in order, with the fields asked for, however small the parts."""
    monkeypatch.setattr(readers, "PART_BYTES", part_bytes)
    WRITERS[name](tmp_path / name)
    source = source_of(tmp_path / name, fields=FIELDS, language="xx")
    documents = read(source)
    assert texts(documents) == [record["text"] for record in RECORDS]
    for document, record in zip(documents, RECORDS, strict=True):
        assert isinstance(document, Document)
        assert document.fields == {"language": "fi", "path": record["path"], "stars": record["meta"]["stars"]}
    places = [document.where for document in documents]
    assert len(set(places)) == len(places)
    assert all(place.startswith(f"{tmp_path / name}, ") for place in places)
    (file,) = source.files("train")
    parts = source.parts(file)
    assert source.parts(file) == parts
    divisible = {"a.jsonl", "groups.parquet", "examples.array_record", "json.array_record"}
    assert (len(parts) > 1) == (name in divisible and part_bytes < file.size)


def test_rows_are_counted_through_the_file(tmp_path: Path) -> None:
    """Also where a part is more than pyarrow reads at once."""
    numbers = [str(number) for number in range(150_000)]
    parquet.write_table(pa.table({"text": numbers}), tmp_path / "a.parquet", row_group_size=100_000)
    documents = read(source_of(tmp_path / "a.parquet"))
    assert [document.where for document in documents] == [
        f"{tmp_path}/a.parquet, row {number:,}" for number in range(150_000)
    ]
    assert texts(documents) == numbers


def test_dataset_saved_on_disk(tmp_path: Path) -> None:
    """The layout of the hub library's `save_to_disk`: data-*.arrow streams beside two JSON files."""
    for shard in range(3):
        write_arrow(tmp_path / f"data-{shard:05}-of-00003.arrow", RECORDS[shard * 20 : shard * 20 + 20])
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    documents = read(Source({"train": (f"{tmp_path}/data-*.arrow",)}, "arrow", fields=FIELDS))
    assert texts(documents) == [record["text"] for record in RECORDS]
    assert documents[27].where == f"{tmp_path}/data-00001-of-00003.arrow, row 7"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_is_a_document_a_file(tmp_path: Path, suffix: str) -> None:
    contents = {"a": "ensimmäinen\r\n\n日本語", "b": "𝒳\n"}
    for name, text in contents.items():
        packed = {
            "": text.encode(),
            ".gz": gzip.compress(text.encode()),
            ".zst": pa.compress(text.encode(), "zstd", asbytes=True),
        }
        (tmp_path / f"{name}.md{suffix}").write_bytes(packed[suffix])
    documents = read(Source({"train": (f"{tmp_path}/*.md{suffix}",)}, "text", fields={"path": "path"}))
    assert texts(documents) == list(contents.values())
    assert [document.fields["path"] for document in documents if isinstance(document, Document)] == [
        f"{tmp_path}/{name}.md{suffix}" for name in contents
    ]


def test_fields_instead_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "2 + 2?", "a": {"b": [{"c": "4"}]}}\n')
    (document,) = read(
        source_of(tmp_path / "a.jsonl", text=None, fields={"question": "q", "answer": "a.b", "deeper": "a.b.c"})
    )
    assert document == Document(
        (), {"language": "und", "question": "2 + 2?", "answer": [{"c": "4"}]}, f"{tmp_path}/a.jsonl, byte 0"
    )


def test_inward_text(tmp_path: Path) -> None:
    """A dotted name goes inward, unless a field has that very name, as features of TFDS do."""
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "inside"}}\n{"a.b": "outside", "a": {"b": "inside"}}\n')
    assert texts(read(source_of(tmp_path / "a.jsonl", text="a.b"))) == ["inside", "outside"]


@pytest.mark.parametrize("language", ["null", "3", '""', '"\\ud800"', '"fi\\tx"', '["fi"]'])
def test_record_without_a_usable_language_has_the_sources(tmp_path: Path, language: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "language": {language}}}\n')
    (document,) = read(source_of(tmp_path / "a.jsonl", fields={"language": "language"}, language="fi"))
    assert isinstance(document, Document)
    assert document.fields == {"language": "fi"}


# ---------------------------------------------------------------- Parts

line = st.text(st.characters(codec="utf-8", exclude_characters="\n") | st.sampled_from("\r äß日𝒳\u2028\0"), max_size=12)


@settings(max_examples=250)
@given(
    lines=st.lists(line, max_size=12),
    ends=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    part_bytes=st.integers(1, 40),
)
def test_parts_have_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ends: str, last: bool, part_bytes: int
) -> None:
    """Wherever the cuts fall: in a line end, in a character, in the middle of nothing. Python's own splitting
    is the measure."""
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    content = ends.join([*lines, *([""] if last else [])]).encode()
    path.write_bytes(content)
    with path.open(newline="\n", encoding="utf-8") as file:
        expected = [one.removesuffix("\n").removesuffix("\r") for one in file]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PART_BYTES", part_bytes)
        source = source_of(path)
        files = source.files("train")
        parts = [part for file in files for part in source.parts(file)]
        documents = read(source)
    assert [(part.start, part.stop) for part in parts] == [
        (start, min(start + part_bytes, len(content))) for start in range(0, len(content), part_bytes)
    ]
    assert sum(part.weight for part in parts) == len(content)
    assert texts(documents) == expected
    for document in documents:
        place = int(document.where.rsplit(" ", 1)[1].replace(",", ""))
        assert content[place:].startswith(document.text.encode())  # type: ignore[union-attr]
        assert place == 0 or content[place - 1 : place] == b"\n"


@settings(max_examples=100)
@given(written=st.lists(st.text(max_size=10), max_size=10), escaped=st.booleans(), part_bytes=st.integers(1, 60))
def test_parts_have_every_json_line_once(
    tmp_path_factory: pytest.TempPathFactory, written: list[str], escaped: bool, part_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=escaped) + "\r\n" for text in written), newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PART_BYTES", part_bytes)
        assert texts(read(source_of(path))) == written


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("format", ["jsonl", "json", "lines", "text"])
def test_byte_order_mark_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, compressed: bool
) -> None:
    """As Python's own codec takes it: at the beginning of a file, and there alone."""
    monkeypatch.setattr(readers, "PART_BYTES", 4)
    written = {"jsonl": '{"text": "a"}\n{"text": "\ufeffb"}\n', "json": '[{"text": "a"}, {"text": "\ufeffb"}]'}.get(
        format, "a\n\ufeffb\n"
    )
    content = written.encode("utf-8-sig")
    path = tmp_path / ("a.gz" if compressed else "a")
    path.write_bytes(gzip.compress(content) if compressed else content)
    expected = [content.decode("utf-8-sig")] if format == "text" else ["a", "\ufeffb"]
    assert texts(read(source_of(path, format=format))) == expected


def test_separators_in_strings_part_no_lines(tmp_path: Path) -> None:
    written = [f"a{separator}b" for separator in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in written), newline=""
    )
    (tmp_path / "a.txt").write_text("\n".join(written), newline="")
    for name in ("a.jsonl", "a.txt"):
        assert texts(read(source_of(tmp_path / name))) == written


# ---------------------------------------------------------------- Bad records

BAD = {
    "not UTF-8": (b'{"text": "a\xff"}', "not UTF-8"),
    "Latin-1": ('{"text": "hyvää"}'.encode("latin-1"), "not UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    "half a line": (b'{"text": "a', "not JSON"),
    "blank": (b"", "not JSON"),
    "deep": (b"[" * 200_000, "not JSON"),
    "a name twice": (b'{"text": "a", "text": "b"}', "a name twice in an object"),
    "a list": (b'["text"]', "not a JSON object"),
    "a string": (b'"text"', "not a JSON object"),
    "missing field": (b'{"txt": "a"}', "no field 'text'"),
    "null": (b'{"text": null}', "field 'text' is no string"),
    "number": (b'{"text": 3}', "field 'text' is no string"),
    "object": (b'{"text": {"en": "a"}}', "field 'text' is no string"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "not UTF-8"),
    "too long": (b'{"text": "' + "ä".encode() * 51 + b'"}', "longer than 100 bytes"),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named_and_stop_nothing(tmp_path: Path, name: str, compressed: bool) -> None:
    content, reason = BAD[name]
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    whole = b'{"text": "before"}\n' + content + b'\n{"text": "' + "ä".encode() * 50 + b'"}\n'
    path.write_bytes(gzip.compress(whole) if compressed else whole)
    before, bad, after = read(source_of(path, longest=100))
    assert isinstance(bad, Bad)
    assert (bad.reason, bad.where) == (reason, f"{path}, line 2" if compressed else f"{path}, byte 19")
    assert len(bad.excerpt) <= 2 * readers.EXCERPT
    assert isinstance(before, Document)
    assert isinstance(after, Document)
    assert (before.text, after.text) == ("before", "ä" * 50)
    bad.excerpt.encode()


@pytest.mark.parametrize("format", ["lines", "text"])
def test_bad_text_is_named(tmp_path: Path, format: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xffa\n")
    (bad,) = read(source_of(tmp_path / "a.txt", format=format))
    assert bad == Bad(f"{tmp_path}/a.txt" + (", byte 0" if format == "lines" else ""), "not UTF-8", bad.excerpt)  # type: ignore[union-attr]
    (tmp_path / "a.txt").write_bytes(b"a" * 101)
    (bad,) = read(source_of(tmp_path / "a.txt", format=format, longest=100))
    assert bad.reason == "longer than 100 bytes"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_bad_row_is_named_and_stops_nothing(tmp_path: Path, name: str) -> None:
    """Arrow does not check its strings: bytes that are not UTF-8 may be in them, inside others too."""
    offsets = pa.array([0, 1, 2, 3, 3], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(b"a\xffb")])
    table = pa.table({"text": column, "meta": pa.StructArray.from_arrays([column], ["inner"])})
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name)
    else:
        with ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    a, bad, b, empty = read(source_of(tmp_path / name))
    assert bad == Bad(f"{tmp_path / name}, row 1", "not UTF-8", repr(b"\xff"))
    assert texts([a, b, empty]) == ["a", "b", ""]
    assert b.where == f"{tmp_path / name}, row 2"


FAR_OFF, FINE = pa.array([2**60, 1], pa.timestamp("ms")), pa.array([1, 1001], pa.timestamp("ns"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_that_nobody_asks_for_are_not_read(tmp_path: Path, name: str) -> None:
    """Times that Python cannot hold, beside the text and inside a column of which another field is wanted. A
    row of such a column that is wanted is bad, and the others are not."""
    nested = pa.StructArray.from_arrays(
        [FAR_OFF, pa.array([3, 4]), pa.StructArray.from_arrays([FINE, pa.array(["x", "y"])], ["t", "s"])],
        ["t", "n", "in"],
    )
    columns = {"text": pa.array(["a", "b"]), "far": FAR_OFF, "fine": FINE, "meta": nested, "a.b": pa.array([5, 6])}
    table = pa.table(columns)
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name)
    else:
        with ipc.new_stream(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    assert texts(read(source_of(tmp_path / name))) == ["a", "b"]
    fields = {"n": "meta.n", "s": "meta.in.s", "ab": "a.b", "none": "none", "deeper": "text.none"}
    documents = read(source_of(tmp_path / name, fields=fields))
    assert texts(documents) == ["a", "b"]
    assert [document.fields for document in documents] == [  # type: ignore[union-attr]
        {"language": "und", "n": 3, "s": "x", "ab": 5},
        {"language": "und", "n": 4, "s": "y", "ab": 6},
    ]
    bad, good = read(source_of(tmp_path / name, fields={"far": "far"}))
    assert (bad.reason, bad.where) == ("a value that Python has no type for", f"{tmp_path / name}, row 0")  # type: ignore[union-attr]
    assert texts([good]) == ["b"]
    assert [bad.reason for bad in bad_of(read(source_of(tmp_path / name, text="nowhere")))] == [
        "no field 'nowhere'"
    ] * 2


@pytest.mark.parametrize("name", ["a.tfrecord", "a.array_record"])
def test_bad_records_are_named_and_stop_nothing(tmp_path: Path, name: str) -> None:
    import tensorflow as tf

    def of(**features: tf.train.Feature) -> bytes:
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    def strings(*values: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    contents = {
        b"garbage": "neither a tf.train.Example nor JSON",
        b"": "no field 'text'",
        b'{"text": ': "not JSON",
        of(other=strings(b"a")): "no field 'text'",
        of(text=strings(b"a\xff")): "not UTF-8",
        of(text=strings(b"a", b"b")): "field 'text' is no string",
        of(text=tf.train.Feature(int64_list=tf.train.Int64List(value=[3]))): "field 'text' is no string",
        of(text=tf.train.Feature()): "field 'text' is no string",
        of(text=strings(b"a"), image=strings(b"\xff\xd8")): "",
    }
    (write_tfrecord if name == "a.tfrecord" else write_array_record)(tmp_path / name, list(contents))
    records = read(source_of(tmp_path / name))
    assert [record.reason if isinstance(record, Bad) else "" for record in records] == list(contents.values())
    assert [record.where for record in records] == [
        f"{tmp_path / name}, record {number}" for number in range(len(contents))
    ]


def test_surrogates_in_other_fields_stop_no_build(tmp_path: Path) -> None:
    """JSON can spell half a surrogate pair in any field: the record is bad once a step makes text of it, and
    can be looked up as JSON."""
    lines = [{"text": "good", "path": "a.py"}, {"text": "bad", "path": "a\ud800.py"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    source = source_of(tmp_path / "a.jsonl", fields={"path": "path"})
    recipe = Recipe("t", "train", source, (_PathAsText(),), ByteTokenizer(), append_eos=True)
    store = build_stores([recipe], tmp_path / "stores", max_bad_fraction=0.5)["t/train"]
    assert store.info.documents == 1
    (rejected,) = map(json.loads, (tmp_path / "stores" / "t" / "train" / "rejected.jsonl").read_text().splitlines())
    assert (rejected["where"], rejected["begins"]) == (f"{tmp_path}/a.jsonl, byte 33", "a\ud800.py bad")
    assert "surrogates not allowed" in rejected["reason"]


class _PathAsText(CodeFormat):
    def __call__(self, document: Document) -> Document:
        (piece,) = document.pieces
        return Document(
            (piece._replace(text=f"{document.fields['path']} {piece.text}"),), document.fields, document.where
        )


# ---------------------------------------------------------------- Damaged files


DAMAGED = [name for name in WRITERS if name not in ("a.jsonl", "several-members.jsonl.gz", "several-frames.jsonl.zst")]


@pytest.mark.parametrize("name", DAMAGED)
def test_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    """Wherever it ends, but between two whole records, no file that ends early is taken for a shorter one."""
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    step = max(1, len(content) // (12 if "record" in name else 40))
    between = set()
    if name.endswith(".tfrecord"):
        sizes = [len((json_record if "json" in name else example)(record)) + 16 for record in RECORDS]
        between = {sum(sizes[:count]) for count in range(len(sizes))}
    if name == "a.arrow":
        step = 97  # messages are aligned to 8 bytes: these cuts are within one
    for length in {*range(1, len(content), step), len(content) - 1} - between:
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            read(source_of(tmp_path / name))


@pytest.mark.parametrize("format", ["parquet", "arrow", "array_record", "tfrecord", "jsonl"])
def test_file_of_another_format_is_named(tmp_path: Path, format: str) -> None:
    path = tmp_path / ("other.zst" if format == "jsonl" else "other")
    path.write_bytes(b"PK\x03\x04 something else altogether" * 40)
    with pytest.raises(InputError, match="other"):
        read(source_of(path, format=format))


def test_flipped_bit_in_a_compressed_file_is_noticed(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(json_lines(RECORDS)))
    content[len(content) // 2] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz"):
        read(source_of(tmp_path / "a.jsonl.gz"))


# ---------------------------------------------------------------- Finding files

TREE = [
    "a.txt",
    "b.txt",
    "c",
    ".hidden.txt",
    "d/a.txt",
    "d/xb.txt",
    "d/b1.txt",
    "d/e/b2.txt",
    "d/e/f/b3.txt",
    "d/e/UP.TXT",
]
TREE += ["d/.h/b4.txt", "d/e/.x.txt", "we[ird]/a.txt", "spa ce/日本.txt", "two/e/b.txt", ".d/a.txt"]
PATTERNS = ["*.txt", "**/*.txt", "**/b*.txt", "d/**/b*.txt", "d/**", "**", "*/**", "d/**/e/*.txt", "*/*.txt", "?.txt"]
PATTERNS += ["[ab].txt", "[!a].txt", "[a-b]*", "d/*/b?.txt", "**/.x*", "**.txt", "d/**.txt", "we[[]ird]/*", "we*/a.txt"]
PATTERNS += [
    "d/e/**/b3.txt",
    "d/**/**/b*.txt",
    "nothere/*.txt",
    "link/*.txt",
    "link/**/*.txt",
    "**/e/**/*.txt",
    ".*",
    ".*/*",
]
PATTERNS += [
    "d/.h/*",
    "*/e/*",
    "**/e/b*",
    "**/f/**",
    "a.txt",
    "nothere.txt",
    "d",
    "d/e/../*.txt",
    "[.]hidden.txt",
    "**/**",
]
PATTERNS += ["a.txt/*", "a.txt/**", "d//*.txt", "./a.txt", "spa*/日*", "**/日本.txt", "*.TXT", "**/UP.*"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for name in TREE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "link").symlink_to(root / "d")
    (root / "link.txt").symlink_to(root / "a.txt")
    (root / "empty.txt").touch()
    return root


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("how", ["absolute", "relative", "URL"])
def test_find_is_pythons_glob(tree: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, how: str) -> None:
    monkeypatch.chdir(tree)
    pattern = pattern if how == "relative" else f"{tree}/{pattern}"
    expected = {os.path.abspath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    found = find(pattern if how != "URL" else f"file://{pattern}")
    paths = [file.url.removeprefix("file://") for file in found]
    assert all(file.url.startswith("file://") == (how == "URL") for file in found)
    assert list(map(os.path.normpath, paths)) == sorted(
        expected, key=lambda path: path if how != "URL" else f"file://{path}"
    )
    for file, path in zip(found, paths, strict=True):
        assert (file.size, file.modified) == (os.stat(path).st_size, os.stat(path).st_mtime_ns)
        assert file.name == Path(path).name
        with open_file(file.url) as opened:
            assert opened.read() == Path(path).read_bytes()


def test_relative_pattern_longer_than_the_way_to_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    found = find(f"{str(tree)[1:]}/d/*.txt")
    assert [file.url for file in found] == sorted(glob.glob(f"{tree}/d/*.txt"))


names = st.text("ab.", min_size=1, max_size=3).filter(lambda name: name.strip("."))
patterns = st.lists(
    st.sampled_from(["**", "*", "a*", "*b", "?", ".*", "[ab]", "[!a]?"]) | names, min_size=1, max_size=4
).map("/".join)


@settings(max_examples=300)
@given(paths=st.lists(st.lists(names, min_size=1, max_size=4).map("/".join), min_size=1, max_size=12), pattern=patterns)
def test_find_is_pythons_glob_on_any_tree(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str], pattern: str
) -> None:
    root = tmp_path_factory.mktemp("any")
    for path in paths:
        try:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        except OSError:  # a file stands where a folder should
            continue
    expected = {path for path in glob.glob(f"{root}/{pattern}", recursive=True) if os.path.isfile(path)}
    assert [file.url for file in find(f"{root}/{pattern}")] == sorted(expected)


def test_patterns_in_order(tree: Path) -> None:
    source = Source({"train": (f"{tree}/d/*.txt", f"{tree}/a.txt")}, "lines")
    assert [file.url.removeprefix(f"{tree}/") for file in source.files("train")] == [
        "d/a.txt",
        "d/b1.txt",
        "d/xb.txt",
        "a.txt",
    ]


@pytest.mark.parametrize("how", ["absolute", "relative", "URL"])
def test_a_path_that_is_there_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Whatever characters it has, and whatever else it would match; as the beginning of a pattern too."""
    monkeypatch.chdir(tmp_path)
    names = [
        "a[1].txt",
        "a1.txt",
        "b{x}.txt",
        "c d.txt",
        "e*.txt",
        "ex.txt",
        "f?.txt",
        "fx.txt",
        "[g]/a.txt",
        "g/a.txt",
        "[!h]*/[i]/j.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    prefix = {"absolute": f"{tmp_path}/", "relative": "", "URL": f"file://{tmp_path}/"}[how]

    def found(pattern: str) -> list[str]:
        return [file.url.removeprefix("file://").removeprefix(f"{tmp_path}/") for file in find(prefix + pattern)]

    for name in names:
        assert found(name) == [name]
    assert found("[g]/*.txt") == ["[g]/a.txt"]
    assert found("[!h]*/[i]/*") == ["[!h]*/[i]/j.txt"]
    assert found("[gx]/*.txt") == ["g/a.txt"]
    assert found("*.txt") == sorted(name for name in names if "/" not in name)


def test_no_file_is_read_twice(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By two patterns, by two spellings of a path, by a link: it is refused, and both ways to it are named."""
    monkeypatch.chdir(tree)
    twice = {
        ("d/*.txt", "d/a*"): "d/a.txt would be read twice, found by d/[*].txt and d/a[*]",
        ("a.txt", "./a.txt"): "a.txt would be read twice, found by a.txt and ./a.txt",
        ("a.txt", "a.txt"): "a.txt would be read twice, found by a.txt and a.txt",
        ("a.txt", f"file://{tree}/d/../a.txt"): "one file, would be read twice",
        (
            "d/a.txt",
            "link/a.txt",
        ): "d/a.txt and .*link/a.txt, one file, would be read twice, found by d/a.txt and link/a.txt",
        ("*.txt",): "a.txt and .*/link.txt, one file, would be read twice, found by [*].txt",
    }
    for patterns, message in twice.items():
        with pytest.raises(InputError, match=message):
            Source({"train": patterns}, "lines").files("train")
    assert len(Source({"train": ("[ab].txt", "d/*.txt")}, "lines").files("train")) == 5


def test_missing_file(tmp_path: Path) -> None:
    assert find(f"{tmp_path}/none.jsonl") == []
    for opened in (open_file, open_stream):
        with pytest.raises(InputError, match=r"none\.jsonl: cannot be read"):
            opened(f"{tmp_path}/none.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.tfrecord"])
def test_file_of_no_bytes_holds_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert read(source_of(tmp_path / name)) == []


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.arrow", "a.array_record"])
def test_file_of_no_bytes_is_cut_short(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read(source_of(tmp_path / name))


@pytest.mark.parametrize("url", ["http://example.org/a.jsonl", "hdfs://a/b", "gcs://a/b"])
def test_unknown_scheme_is_named(url: str) -> None:
    for use in (find, open_file, open_stream):
        with pytest.raises(InputError, match=rf"{url}: a file is a local path, or begins with gs:// or s3://"):
            use(url)


def test_unknown_format_is_named() -> None:
    with pytest.raises(InputError, match="'csv' is none of jsonl"):
        Source({}, "csv")  # type: ignore[arg-type]


@pytest.fixture
def s3_server() -> Iterator[tuple[str, list[str]]]:
    """One object, as much of S3's protocol as reading it takes; the requests are noted."""
    content = json_lines(RECORDS)
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            here = content[int(first or 0) : int(last) + 1 if last else None]
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(here)))
            self.send_header("Last-Modified", "Wed, 01 Nov 2023 00:00:00 GMT")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(here)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_s3_goes_to_the_endpoint(s3_server: tuple[str, list[str]]) -> None:
    """In a process of its own: pyarrow's S3 does not like to be started twice."""
    endpoint, requests = s3_server
    code = (
        "from aurora_jax.data.text.sources import Source\n"
        "source = Source({'train': ('s3://bucket/folder/a.jsonl',)}, 'jsonl')\n"
        "(file,) = source.files('train')\n"
        "print(file.url, file.size, *(document.text for part in source.parts(file) for document in "
        "source.read(part)), sep='|')\n"
    )
    secrets = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | secrets,
        capture_output=True,
        check=True,
    )
    assert (
        run.stdout.decode()
        == "|".join(["s3://bucket/folder/a.jsonl", str(len(json_lines(RECORDS))), *(r["text"] for r in RECORDS)]) + "\n"
    )
    assert set(requests) == {"HEAD /bucket/folder/a.jsonl", "GET /bucket/folder/a.jsonl"}
