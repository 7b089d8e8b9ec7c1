"""JSON lines: the project's one reader and one writer of them.

Lines end at the byte 0x0A, a carriage return before it is white space, and nothing else divides them: U+2028,
U+0085, U+000B and the other characters at which `str.splitlines` cuts may stand in a JSON string as they are
(RFC 8259, section 7). Text is UTF-8, checked; a byte-order mark before a value is no part of it. What JSON
leaves open: a name that an object has twice is an error, since one of its values would be lost; NaN and the
infinities, which Python writes, are read and written back as they came; half a surrogate pair, which JSON can
spell (`"\\ud83d"`) and UTF-8 cannot, is read and written back in JSON's spelling.
"""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aurora_jax.errors import InputError

NOT_AN_OBJECT = "not a JSON object"


class BadLine(ValueError):
    """A line that is not the JSON expected.

    Attributes:
        reason: what is wrong, in words that can be counted; the message may say more.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def value_of(line: bytes) -> Any:
    """The JSON value of a line, its end included or not. Raises BadLine."""
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise BadLine("not UTF-8", f"{error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadLine("not JSON", f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise BadLine("not JSON", "nested too deeply") from None
    except BadLine:
        raise
    except ValueError as error:  # a number of more digits than Python reads
        raise BadLine("not JSON", str(error)) from None


def object_of(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises BadLine, also if it is another value."""
    value = value_of(line)
    if not isinstance(value, dict):
        raise BadLine(NOT_AN_OBJECT)
    return value


def values(content: bytes, where: object) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line of a file's content that is not blank.

    Raises:
        InputError: a line is bad; it is named by `where` and its number.
    """
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        try:
            yield number, value_of(line)
        except BadLine as error:
            raise InputError(f"{where}, line {number}: {error}") from None


def objects(content: bytes, where: object) -> Iterator[tuple[int, dict[str, Any]]]:
    """`values` that are all objects. Raises InputError, also for a line that is another value."""
    for number, value in values(content, where):
        if not isinstance(value, dict):
            raise InputError(f"{where}, line {number}: {NOT_AN_OBJECT}")
        yield number, value


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a file. Raises InputError if it cannot be read or a line is bad."""
    return [record for _, record in objects(_content(path), path)]


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a file that its writer may have died over: a last line that is only the beginning of an
    object does not count.

    Raises:
        InputError: the file cannot be read, or another line is bad.
    """
    finished, last = _parted(path)
    return [*(record for _, record in objects(finished, path)), *([object_of(last)] if _is_object(last) else [])]


def mend_log(path: str | os.PathLike[str]) -> None:
    """Prepares such a file, if it is there, for who goes on writing: the last line is ended, or cut off where
    `read_log` leaves it out."""
    if os.path.exists(path):
        finished, last = _parted(path)
        if _is_object(last):
            with open(path, "ab") as file:
                file.write(b"\n")
        elif last:
            os.truncate(path, len(finished))


def line_of(value: Any) -> bytes:
    """A value as a line, its end included."""
    # What UTF-8 cannot hold is halves of surrogate pairs, inside strings; Python's escape for them is JSON's.
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def has_half_a_character(text: str) -> bool:
    """Whether a string that came out of JSON holds half a surrogate pair: it is no text, and no tokenizer takes it."""
    return any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise BadLine("a name twice in an object", repr(next(name for name in names if names.count(name) > 1)))
    return found


def _parted(path: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    """The lines of a file that have an end, and the last if it has none."""
    content = _content(path)
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _is_object(line: bytes) -> bool:
    try:
        object_of(line)
    except BadLine:
        return False
    return True


def _content(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
