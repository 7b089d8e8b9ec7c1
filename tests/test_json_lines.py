"""JSON lines: what we write other readers read, what other writers wrote we read, and a bad line is named by
its number."""

import codecs
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import json as arrow_json

from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"
"""Where `str.splitlines` cuts, but for the line feed."""

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(SEPARATORS + '\n\\"\ufeff\0'), max_size=20)


@given(written=st.lists(texts, min_size=1, max_size=8))
def test_what_we_write_arrow_reads(written: list[str]) -> None:
    """pyarrow's reader of newline-delimited JSON finds the texts, and so do we, in as many lines as there are
    records."""
    content = b"".join(json_lines.line_of({"text": text}) for text in written)
    assert content.count(b"\n") == len(written)
    table = arrow_json.read_json(
        pa.BufferReader(content),
        parse_options=arrow_json.ParseOptions(explicit_schema=pa.schema({"text": pa.string()})),
    )
    assert table["text"].to_pylist() == written
    assert [record["text"] for _, record in json_lines.objects(content, "")] == written


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n", " \n\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_what_python_writes_we_read(tmp_path: Path, ensure_ascii: bool, end: str, mark: bytes) -> None:
    records = [{"text": f"a{separator}b", "n": [1, 2.5, None, True]} for separator in SEPARATORS] + [
        {"ä": {"日本": "𝒳"}}
    ]
    content = "".join(json.dumps(record, ensure_ascii=ensure_ascii) + end for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(mark + content)
    assert json_lines.read(tmp_path / "a.jsonl") == records


@given(st.text(max_size=10))
def test_any_string_that_json_can_spell_comes_back(text: str) -> None:
    """Halves of surrogate pairs too, of which UTF-8 has none."""
    escaped = json.dumps({text: [text]}).encode()
    line = json_lines.line_of(json_lines.object_of(escaped))
    line.decode()
    assert json.loads(line) == json.loads(escaped)


def test_numbers_that_are_none_come_back() -> None:
    assert json_lines.line_of(json_lines.object_of(b'{"a": NaN, "b": -Infinity}')) == b'{"a": NaN, "b": -Infinity}\n'


BAD = {
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
    "a surrogate as UTF-8": (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "half": (b'{"a": ', "not JSON: Expecting value at character 6"),
    "two values": (b'{"a": 1} {"a": 2}', "not JSON: Extra data"),
    "a string over two lines": (b'{"a": "b', "not JSON"),
    "too deep": (b'{"a": ' + b"[" * 100_000, "not JSON"),
    "too many digits": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    "a name twice": (b'{"a": 1, "b": 2, "a": 3}', "a name twice in an object: 'a'"),
    "a name twice inside": (b'{"a": [{"b": 2, "b": 2}]}', "a name twice in an object: 'b'"),
    "a list": (b"[1]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(tmp_path: Path, name: str) -> None:
    line, message = BAD[name]
    (tmp_path / "a.jsonl").write_bytes(b'{"good": "\xe2\x80\xa8"}\n\n' + line + b"\n{}\n")
    with pytest.raises(InputError, match=rf"^{tmp_path}/a\.jsonl, line 3: {message}"):
        json_lines.read(tmp_path / "a.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read"):
        json_lines.read(tmp_path / "none.jsonl")


def test_a_log_goes_on_wherever_its_writer_died(tmp_path: Path) -> None:
    """Cut at every byte: what was whole counts, what was not goes, and the next line stands on its own."""
    records = [{"text": "ä\u2028"}, {"n": 12}, {"text": "}"}]
    content = b"".join(map(json_lines.line_of, records))
    log = tmp_path / "log.jsonl"
    for length in range(len(content) + 1):
        log.write_bytes(content[:length])
        whole = [
            record
            for number, record in enumerate(records)
            if length >= len(b"".join(map(json_lines.line_of, records[: number + 1]))) - 1
        ]
        assert json_lines.read_log(log) == whole
        json_lines.mend_log(log)
        with log.open("ab") as file:
            file.write(json_lines.line_of({"next": 1}))
        assert json_lines.read(log) == [*whole, {"next": 1}]
    log.write_bytes(b"{\n{}\n{")
    with pytest.raises(InputError, match=r"log\.jsonl, line 1: not JSON"):
        json_lines.read_log(log)
