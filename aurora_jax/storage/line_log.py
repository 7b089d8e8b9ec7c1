"""A log of JSON lines that grows: one file that is appended to, or in a bucket, where nothing can be, segments.

The log `OUTPUT/metrics.jsonl` in a bucket is `OUTPUT/metrics-000000.jsonl`, `OUTPUT/metrics-000001.jsonl`, ...; laid
end to end they are the file that there would be. Only the last one is written again when lines come, so that what a
line costs does not grow with the log.
"""

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aurora_jax.errors import InputError
from aurora_jax.storage import json_lines
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Place, is_remote, refused_as

SEGMENT_BYTES = 256 << 10
"""A segment that is longer is the last one no more."""
SECONDS = 30.0
"""Between two writes to a bucket: lines of so long can be lost with a process. `flush` loses none."""
TRIES, FIRST_PAUSE = 5, 5.0
"""Of a flush, above what the storage's library tries, and the seconds to the second one; they double."""
READERS = 16


def is_there(path: Place) -> bool:
    """Has anything been logged there, or been meant to?"""
    return path.is_file() or bool(is_remote(path) and _segments(path))


def read_log(path: Place) -> list[dict[str, Any]]:
    """The objects of a log, in order; of a last line that a dying process left unfinished nothing. Raises InputError as
    `json_lines.read_log`."""
    return [row for _, rows in _read(path) for row in rows]


def _read(path: Place) -> list[tuple[Place, list[dict[str, Any]]]]:
    """By segment."""
    if isinstance(path, Path):
        return [(path, json_lines.read_log(path))]
    segments = [path] if path.is_file() else _segments(path)
    with ThreadPoolExecutor(READERS) as pool:
        contents = pool.map(lambda segment: segment.read_bytes(), segments)
        return [
            (segment, [row for _, row in json_lines.objects(content, segment)])
            for segment, content in zip(segments, contents, strict=True)
        ]


def _segments(path: Place) -> list[Place]:
    if not path.parent.is_dir():
        return []
    names = (f"{path.stem}-", path.suffix)
    found = [entry for entry in path.parent.iterdir() if entry.name.startswith(names[0]) and entry.suffix == names[1]]
    return sorted(entry for entry in found if entry.stem.removeprefix(names[0]).isdigit())


def rewrite(path: Place, rows: Sequence[dict[str, Any]]) -> None:
    """Puts these rows, which are the log's own in their order, some left out, in the place of all. Segments whose rows
    all stay are left alone."""
    if not is_remote(path):
        write_file(path, b"".join(map(json_lines.line_of, rows)))
        return
    left = deque(map(json_lines.line_of, rows))
    for segment, its in _read(path):
        lines = list(map(json_lines.line_of, its))
        stay = [line for line in lines if left and line == left[0] and left.popleft()]
        if not stay:
            segment.unlink()
        elif len(stay) < len(lines):
            write_file(segment, b"".join(stay))
    assert not left


class LineLog:
    """Appends to a log."""

    def __init__(self, path: Place):
        self._path, self._remote = path, is_remote(path)
        self._file = None if self._remote else path.open("ab")
        segments = _segments(path) if self._remote else []
        self._number = int(segments[-1].stem.rpartition("-")[2]) + 1 if segments else 0
        self._segment, self._written, self._next = b"", 0, time.monotonic() + SECONDS

    def append(self, row: Any) -> None:
        """A file has the line when this returns; a bucket has it some time later. Raises InputError if a file system
        refuses it."""
        line = json_lines.line_of(row)
        if self._file is not None:
            with refused_as(f"{self._path} cannot be written"):
                self._file.write(line)
                self._file.flush()
            return
        self._segment += line
        if time.monotonic() >= self._next or len(self._segment) >= SEGMENT_BYTES:
            self._next = time.monotonic() + SECONDS
            try:
                self._put()
            except Exception as error:  # it stays in memory; flush insists
                print(f"{self._path.parent}: metrics could not be written yet: {error}", flush=True)

    def flush(self) -> None:
        """Returns when every line is stored.

        Raises:
            InputError: the storage has refused it, TRIES times.
        """
        pause = FIRST_PAUSE
        for number in range(1, TRIES + 1):
            try:
                self._put()
                return
            except Exception as error:
                said = f"{self._path.parent}: metrics could not be written: {error}"
                if number == TRIES:
                    raise InputError(said) from error
                print(f"{said}; next try in {pause:.0f} s", flush=True)
                time.sleep(pause)
                pause *= 2

    def close(self) -> None:
        """Raises InputError as `flush`."""
        self.flush()
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a line that was refused, which has been said
                self._file.close()

    def _put(self) -> None:
        if self._file is not None or len(self._segment) == self._written:
            return
        write_file(self._path.with_name(f"{self._path.stem}-{self._number:06d}{self._path.suffix}"), self._segment)
        self._written = len(self._segment)
        if self._written >= SEGMENT_BYTES:
            self._segment, self._written, self._number = b"", 0, self._number + 1
