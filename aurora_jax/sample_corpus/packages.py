"""Packages on disk, of any registry: what they are, and reading a few of their files without unpacking the rest."""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One downloaded package. `size` is in bytes."""

    name: str
    version: str
    path: Path
    size: int


def read_members(path: Path, pattern: str) -> list[tuple[str, re.Match[str], bytes]]:
    """(name, match, content) of every file in a .deb, .whl, .zip or .tar.gz whose whole name matches, sorted by name.

    Names start without "./". Nothing is written to disk.
    """
    matcher = re.compile(pattern)
    found = ((name, matcher.fullmatch(name), content) for name, content in _files(path, matcher))
    return sorted(((name, match, content) for name, match, content in found if match), key=lambda member: member[0])


def _files(path: Path, matcher: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".deb":
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as unpacking:
            assert unpacking.stdout is not None
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as tar:
                yield from _tar_files(tar, matcher)
            unpacking.stdout.read()  # the padding that ends a tar file: dpkg-deb must not meet a closed pipe
    elif path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist() if matcher.fullmatch(name))
    else:
        with tarfile.open(path) as tar:
            yield from _tar_files(tar, matcher)


def _tar_files(tar: tarfile.TarFile, matcher: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isfile() and matcher.fullmatch(name):
            content = tar.extractfile(member)
            assert content is not None
            yield name, content.read()
