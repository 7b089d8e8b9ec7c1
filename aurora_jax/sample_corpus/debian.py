"""Packages from Debian and its kin through apt, without root."""

from __future__ import annotations

import contextlib
import email.parser
import os
import shutil
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from aurora_jax.errors import InputError
from aurora_jax.sample_corpus.packages import Package

# Download as whoever we are: apt's own user may not write into our folder.
_UNSANDBOXED = ("-o", "APT::Sandbox::User=root") if os.getuid() == 0 else ()


@dataclass(frozen=True)
class PackageRecord:
    """What apt's lists say of one package: the newest version that would be installed, the archive's file
    name and size in bytes."""

    name: str
    version: str
    file_name: str
    size: int


def available(names: Iterable[str]) -> dict[str, PackageRecord]:
    """The records of those packages that apt's lists have; empty where apt is not there or has no lists."""
    if shutil.which("apt-cache") is None or shutil.which("dpkg-deb") is None:
        return {}
    output = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", *names], capture_output=True, text=True, check=False
    ).stdout
    records = {}
    for paragraph in output.split("\n\n"):
        fields = email.parser.HeaderParser().parsestr(paragraph.lstrip())
        # A package that was installed by hand has no archive to fetch.
        if fields["Package"] and fields["Filename"]:
            name, version = fields["Package"], fields["Version"]
            file_name = f"{name}_{urllib.parse.quote(version, safe='+~').lower()}_{fields['Architecture']}.deb"
            records[name] = PackageRecord(name, version, file_name, int(fields["Size"]))
    return records


def update_lists() -> bool:
    """Refresh apt's lists; False where that needs root and we are not, or the mirrors cannot be reached."""
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        return False
    return subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False).returncode == 0


def fetch(records: Iterable[PackageRecord], cache: Path, on_bytes: Callable[[int], None]) -> list[Package]:
    """Download what `cache` does not hold yet, all in one apt call.

    Args:
      records: from `available`.
      cache: a folder that keeps the archives from one build to the next.
      on_bytes: told the total number of bytes present, while it grows.

    Raises:
      InputError: a download failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    records = list(records)
    missing = [record for record in records if not _is_whole(cache / record.file_name, record)]
    present = sum(record.size for record in records) - sum(record.size for record in missing)
    if missing:
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [
                "apt-get",
                "download",
                "-q",
                *_UNSANDBOXED,
                *(f"{record.name}={record.version}" for record in missing),
            ]
            log = Path(folder, "apt.log")
            with (
                log.open("wb") as output,
                subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT) as download,
            ):
                while download.poll() is None:
                    on_bytes(present + _downloaded(folder))
                    time.sleep(0.1)
            if download.returncode != 0:
                raise InputError(
                    f"apt-get download failed:\n{log.read_text().strip()[-600:]}\nRun `apt-get update` as "
                    "root, or use --sources pypi."
                )
            for record in missing:
                [archive] = Path(folder).glob(f"{record.name}_*.deb")
                archive.replace(cache / record.file_name)
    on_bytes(sum(record.size for record in records))
    return [Package(record.name, record.version, cache / record.file_name, record.size) for record in records]


def _is_whole(path: Path, record: PackageRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size


def _downloaded(folder: str) -> int:
    """Bytes of the archives in `folder` so far. apt creates and renames them while we look, so a miss now is
    not an error."""
    total = 0
    for path in Path(folder).glob("*.deb"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
