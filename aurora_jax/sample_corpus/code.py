"""Code that is already on the machine: Python's standard library, and npm's JavaScript where Node is installed."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LARGEST_FILE = 60_000
HELD_OUT_MODULUS = 35

# Tests, tables, other people's code, copies (npm's dist/ holds each file twice), and what later Pythons dropped.
_SKIPPED_FOLDERS = frozenset(
    (
        *(
            "test",
            "tests",
            "idle_test",
            "encodings",
            "pydoc_data",
            "site-packages",
            "dist-packages",
            "_vendor",
            "ensurepip",
        ),
        *("lib-dynload", "__pycache__", "dist", "distutils", "lib2to3"),
    )
)
_PERMISSIVE = re.compile(r"MIT|ISC|Artistic-2\.0|BSD-[23]-Clause|Apache-2\.0|BlueOak-1\.0\.0|0BSD|CC0-1\.0|Unlicense")
_MEAN_LINE = (8, 80)
_LONGEST_LINE = 400


@dataclass(frozen=True)
class CodeFile:
    """One source file. `path` is relative to its project's root, with forward slashes."""

    project: str
    version: str
    path: str
    license: str
    text: str

    @property
    def held_out(self) -> bool:
        """Python alone is held out, by its path: the choice is the same on every machine and nearly so for
        every Python."""
        return (
            self.path.endswith(".py")
            and int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % HELD_OUT_MODULUS == 0
        )


def standard_library(root: Path | None = None) -> Iterator[CodeFile]:
    """The running Python's library, sorted by path, without tests, tables and files over LARGEST_FILE bytes."""
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in _paths(root, ".py"):
        text = _read(path)
        if text and not _is_table(text):
            yield CodeFile("cpython", platform.python_version(), path.relative_to(root).as_posix(), "PSF-2.0", text)


def npm(root: Path | None = None) -> Iterator[CodeFile]:
    """The JavaScript of Node's npm and of the packages inside it that have permissive licences; nothing where
    there is no Node."""
    if root is None:
        node = shutil.which("npm")
        if node is None:
            return
        root = Path(node).resolve().parents[1]
        if root.name != "npm":
            return
    version = _manifest(root).get("version", "unknown")
    for path in _paths(root, ".js"):
        # The nearest package.json above a file that states a licence is its package's.
        above = (_manifest(folder).get("license") for folder in path.parents if folder.is_relative_to(root))
        license = next((name for name in above if isinstance(name, str)), "")
        text = _read(path)
        if text and _PERMISSIVE.fullmatch(license) and not _is_table(text):
            yield CodeFile("npm", version, path.relative_to(root).as_posix(), license, text)


def is_well_documented(text: str) -> bool:
    """Python that parses, has a module docstring, and whose functions and classes mostly have docstrings too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = ast.parse(text)
        except (SyntaxError, ValueError):
            return False
    public = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    documented = sum(ast.get_docstring(node) is not None for node in public)
    return (
        len(text) > 1_000 and ast.get_docstring(module) is not None and bool(public) and documented >= 0.5 * len(public)
    )


def _paths(root: Path, suffix: str) -> list[Path]:
    found = (path for path in root.rglob(f"*{suffix}") if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts[:-1]))
    sized = (path for path in found if path.is_file() and 200 <= path.stat().st_size <= LARGEST_FILE)
    return sorted(sized, key=lambda path: path.relative_to(root).as_posix())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""


def _is_table(text: str) -> bool:
    """Data in the clothes of code: very long lines, or hardly any letters."""
    lines = text.splitlines()
    letters = sum(character.isalpha() for character in text)
    mean = len(text) / max(len(lines), 1)
    return (
        not _MEAN_LINE[0] <= mean <= _MEAN_LINE[1] or max(map(len, lines)) > _LONGEST_LINE or letters < 0.4 * len(text)
    )


def _manifest(folder: Path) -> dict:
    try:
        return json.loads((folder / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
