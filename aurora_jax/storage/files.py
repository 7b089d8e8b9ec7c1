"""Files wherever they lie: a local path, `gs://bucket/path` or `s3://bucket/path`, through pyarrow's file systems.

Credentials are the cloud's own defaults. `STORAGE_EMULATOR_HOST` and `AWS_ENDPOINT_URL` lead to an emulator,
as in the clouds' libraries.
"""

import fnmatch
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Literal
from urllib.parse import urlsplit

import pyarrow
from pyarrow import fs

from aurora_jax.errors import InputError

Compression = Literal["gzip", "zstd", "bz2"]
RETRY = timedelta(seconds=60)
WILDCARDS = "*?["


@dataclass(frozen=True)
class File:
    """A file that was found: its address, size in bytes, and time of change in nanoseconds since 1970."""

    url: str
    size: int
    modified: int

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.url.rsplit("/", 1)[-1]


def find(pattern: str) -> list[File]:
    """The files that a path or a glob pattern names, by address; `**` goes through folders. Empty if there are none.

    As with Python's `glob`, names that begin with a dot are found only by patterns that do. A path that is
    there is that path, whatever characters it has, and so is the beginning of a pattern: `set[1]/*.txt` reads
    the folder `set[1]` where there is one.

    Raises:
        InputError: the file system cannot be reached, or its scheme is none that we know.
    """
    filesystem, path = _locate(pattern)
    scheme = pattern[: pattern.index("://") + 3] if "://" in pattern else ""
    try:
        literal = _literal(filesystem, path)
        if literal == path:
            found = [filesystem.get_file_info(path)]
        else:
            deeper = "/" in path[len(literal) + 1 :] or "**" in path[len(literal) :]
            selector = fs.FileSelector(literal or "/", allow_not_found=True, recursive=deeper)
            wanted = path[len(literal) :].split("/")
            found = [
                info
                for info in filesystem.get_file_info(selector)
                if _matches(info.path[len(literal) :].split("/"), wanted)
            ]
    except NotADirectoryError:  # a file stands where the pattern has a folder
        return []
    except OSError as error:
        raise InputError(f"{pattern}: cannot be listed: {error}") from error
    files = [File(scheme + info.path, info.size, info.mtime_ns or 0) for info in found if info.type == fs.FileType.File]
    return sorted(files, key=lambda file: file.url)


def find_all(patterns: Sequence[str]) -> list[File]:
    """The files of several patterns, in the order of the patterns. Raises InputError as `find_each` does."""
    return [file for files in find_each(patterns) for file in files]


def find_each(patterns: Sequence[str]) -> list[list[File]]:
    """The files of each of several patterns.

    Raises:
        InputError: as `find`, or a file would be read twice: two patterns find it, or one finds it under two
            names (links).
    """
    found = [find(pattern) for pattern in patterns]
    seen: dict[Hashable, tuple[str, File]] = {}
    for pattern, file in [(pattern, file) for pattern, files in zip(patterns, found, strict=True) for file in files]:
        pattern_before, before = seen.setdefault(_identity(file), (pattern, file))
        if before is not file:
            names = before.url if before.url == file.url else f"{before.url} and {file.url}, one file,"
            by = f"{pattern_before} and {pattern}" if pattern_before != pattern or before.url == file.url else pattern
            raise InputError(f"{names} would be read twice, found by {by}: leave one out")
    return found


def _identity(file: File) -> Hashable:
    """The same for two names of one file. Empty files are one another's equals, and harmless."""
    if file.size and ("://" not in file.url or file.url.startswith("file://")):
        status = os.stat(file.url.removeprefix("file://"))
        return status.st_dev, status.st_ino
    return file.url


def below(pattern: str, file: File) -> str:
    """The name of a file that `find(pattern)` found, below the folder that the pattern's fixed beginning names."""
    filesystem, path = _locate(pattern)
    literal = _literal(filesystem, path)
    folder = literal.rpartition("/")[0] if literal == path else literal
    return _locate(file.url)[1].removeprefix(f"{folder}/")


def _literal(filesystem: fs.FileSystem, path: str) -> str:
    """The beginning of a pattern that is a path: the folders before the first part with a wildcard that is no
    name of something there."""
    parts = path.split("/")
    for number, part in enumerate(parts):
        if any(character in part for character in WILDCARDS):
            upto = "/".join(parts[: number + 1])
            if part in ("*", "**") or filesystem.get_file_info(upto).type == fs.FileType.NotFound:
                return "/".join(parts[:number])
    return path


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """fnmatch, part by part, so that `*` stops at a slash; the part `**` stands for any number of parts, as
    the last one for some."""
    if not parts or not patterns:
        return not parts and not patterns
    shown = not parts[0].startswith(".")
    if patterns == ["**"]:
        return shown and (len(parts) == 1 or _matches(parts[1:], patterns))
    if patterns[0] == "**":
        return _matches(parts, patterns[1:]) or (shown and _matches(parts[1:], patterns))
    return (
        (shown or patterns[0].startswith("."))
        and fnmatch.fnmatchcase(parts[0], patterns[0])
        and _matches(parts[1:], patterns[1:])
    )


def patterns_text(patterns: Sequence[str]) -> str:
    """Glob patterns for a message: of many, the first and how many more."""
    return " ".join(patterns) if len(patterns) <= 3 else f"{patterns[0]} and {len(patterns) - 1} more like it"


def open_file(url: str) -> pyarrow.NativeFile:
    """The file for reading at any place. Raises InputError if it is not there."""
    filesystem, path = _locate(url)
    try:
        return filesystem.open_input_file(path)
    except OSError as error:
        raise InputError(f"{url}: cannot be read: {error}") from error


def open_stream(url: str, compression: Compression | None = None) -> pyarrow.NativeFile:
    """The file for reading from its beginning, decompressed. Raises InputError if it is not there."""
    filesystem, path = _locate(url)
    try:
        return filesystem.open_input_stream(path, compression=compression, buffer_size=1 << 20)
    except OSError as error:
        raise InputError(f"{url}: cannot be read: {error}") from error


def _locate(url: str) -> tuple[fs.FileSystem, str]:
    parts = urlsplit(url)
    if "://" not in url:
        return _filesystem("file", None), os.path.abspath(url)
    if parts.scheme == "file":
        return _filesystem("file", None), os.path.abspath(url[len("file://") :])
    endpoint = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}.get(parts.scheme)
    if endpoint is None:
        raise InputError(f"{url}: a file is a local path, or begins with gs:// or s3://")
    return _filesystem(parts.scheme, os.environ.get(endpoint)), url.split("://", 1)[1]


@cache
def _filesystem(scheme: str, endpoint: str | None) -> fs.FileSystem:
    if scheme == "file":
        return fs.LocalFileSystem()
    server = urlsplit(endpoint if not endpoint or "://" in endpoint else f"http://{endpoint}")
    if scheme == "gs" and endpoint:
        return fs.GcsFileSystem(
            anonymous=True, scheme=server.scheme, endpoint_override=server.netloc, retry_time_limit=RETRY
        )
    if scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=RETRY)
    if endpoint:
        return fs.S3FileSystem(scheme=server.scheme, endpoint_override=server.netloc)
    return fs.S3FileSystem()
