"""A run's folder and what lies in it, on a file system or in a bucket of Google's (`gs://`).

A place is a `pathlib.Path`, or in a bucket an `epath.Path`, which has the same methods. Of a bucket is promised: a
file is there whole or not at all; a folder is only the common beginning of names, so that it cannot be renamed or
removed at once; who writes sees what was written. gcsfs asks again, with growing pauses, when the server answers 429
or 5xx or not at all; so does TensorStore, which writes the arrays.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
from etils import epath

from aurora_jax.errors import InputError

Location: TypeAlias = str | os.PathLike[str]
Place: TypeAlias = Path | epath.Path

BUCKET = re.compile(r"(gs|s3):/+")
"""`pathlib` makes one slash of two."""


def place_of(location: Location) -> Place:
    """Where an address or a path leads.

    Raises:
        InputError: it begins with s3://.
    """
    text = os.fspath(location)
    if (found := BUCKET.match(text)) is None:
        return Path(text)
    if found[1] == "s3":
        raise InputError(
            f"s3://{text[found.end() :]}: runs and checkpoints cannot be on s3://, where Orbax does not write: give "
            "a folder or gs://; sources and token stores may be there."
        )
    _prepare()
    return epath.Path(f"gs://{text[found.end() :]}")


def absolute(location: Location) -> epath.Path:
    """As Orbax takes them. Raises InputError as `place_of`."""
    place = place_of(location)
    return place if isinstance(place, epath.Path) else epath.Path(place.absolute())


def absolute_place(place: Place) -> Place:
    """The same place, whatever the working directory becomes; an address is absolute (and not to etils)."""
    return place if is_remote(place) else place.absolute()


def is_remote(place: Location) -> bool:
    """Is it in a bucket?"""
    return BUCKET.match(os.fspath(place)) is not None


def _prepare() -> None:
    """No listings are kept, which would hide what another process has written."""
    logging.getLogger("gcsfs").setLevel(logging.ERROR)  # it warns, at every call, where it may not ask a bucket's kind

    for name in ("gs", "gcs"):
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)


def require_writable(folder: Place) -> None:
    """Makes a folder, if it is not there, and writes and removes a file in it.

    Raises:
        InputError: that is refused.
    """
    probe = folder / f".writable-{os.getpid()}"
    with refused_as(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()


@contextmanager
def refused_as(what: str) -> Iterator[None]:
    """What a storage raises becomes an InputError that begins with `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # gcsfs, aiohttp and Google's libraries have no class in common
        raise InputError(f"{what}: {str(error).splitlines()[0] if str(error) else error!r}") from error


def move(folder: Place, destination: Place, last: Sequence[str]) -> None:
    """Renames a folder. In a bucket its files are moved one by one, those with the names in `last` after all others."""
    if not is_remote(folder):
        folder.rename(destination)
        return
    there = absolute(folder)
    for file in sorted(map(absolute, files_below(there)), key=lambda each: each.name in last):
        # The server copies; etils would send every byte through this host.
        fsspec.filesystem("gcs").mv(str(file), str(absolute(destination) / file.relative_to(there)))


def files_below(folder: Place) -> Iterator[Place]:
    """Every file in a folder and in those in it, in order. etils has no `rglob` in buckets."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from files_below(entry)
        else:
            yield entry


def remove(folder: Place) -> None:
    """A folder with all that is in it."""
    absolute(folder).rmtree()


def status_of(file: Place) -> tuple[int, float]:
    """Size in bytes, and seconds since 1970 of the last change."""
    found: Any = file.stat()
    return (found.length, found.mtime) if isinstance(file, epath.Path) else (found.st_size, found.st_mtime)
