"""Packages from PyPI through pip."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from aurora_jax.errors import InputError
from aurora_jax.sample_corpus.packages import Package

# Taken as source archives, since the wheel leaves the documentation out.
_AS_SOURCE = frozenset({"django"})


def fetch(names: Iterable[str], cache: Path, on_package: Callable[[int], None]) -> list[Package]:
    """The packages' newest archives; an archive that `cache` holds already is used as it is.

    Args:
      names: distribution names.
      cache: a folder that keeps the archives from one build to the next.
      on_package: told the number of packages present, while it grows.

    Raises:
      InputError: a download failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    packages = []
    for name in names:
        archive = _cached(name, cache) or _download(name, cache)
        version = re.split(r"-(?=\d)", archive.name.removesuffix(".tar.gz"), maxsplit=1)[1].split("-")[0]
        packages.append(Package(name, version, archive, archive.stat().st_size))
        on_package(len(packages))
    return packages


def _cached(name: str, cache: Path) -> Path | None:
    suffix = ".tar.gz" if name in _AS_SOURCE else ".whl"
    return max(cache.glob(f"{name.replace('-', '_')}-[0-9]*{suffix}"), default=None)


def _download(name: str, cache: Path) -> Path:
    form = ("--no-binary", name) if name in _AS_SOURCE else ("--only-binary", name)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", folder, name]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            raise InputError(
                f"pip could not download {name}:\n{outcome.stderr.strip()[-600:]}\nCheck the network and the "
                "package index."
            )
        [archive] = Path(folder).iterdir()
        return archive.replace(cache / archive.name)
