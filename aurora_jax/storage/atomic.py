"""Files and folders that are there whole or not at all: written beside their place, and renamed."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aurora_jax.storage.places import Place, is_remote, refused_as


def write_file(path: Place, content: str | bytes) -> None:
    """Writes a file, whose folder is there; one of that name is replaced. A crash leaves the old or the new.

    Raises:
        InputError: the storage refuses it.
    """
    data = content.encode() if isinstance(content, str) else content
    with refused_as(f"{path} cannot be written"):
        if is_remote(path):
            path.write_bytes(data)
        else:
            _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the destination's name at the end, or goes if anything goes wrong.

    Parents are made. A folder that is at the destination then is replaced; who calls has looked whether it may be.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as scratch:
        unfinished = Path(scratch, "unfinished")
        unfinished.mkdir()
        yield unfinished
        if destination.exists():
            destination.rename(Path(scratch, "replaced"))
        unfinished.rename(destination)
