"""What import contracts cannot say of the house: one meaning a name, no room too full, no lumber room, and a page
that says where everything lives."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
FILES = [file for room in ("aurora_jax", "convert") for file in sorted((ROOT / room).rglob("*.py"))]
FULL = {
    "aurora_jax/launch": "one small command for any machine: its parts belong together, and none has 350 lines",
    "aurora_jax/train": "the run, its state and its records; what survives has a wing of its own",
    "aurora_jax/data/curation": "one Beam pipeline and its filters",
}
"""Folders of more than twelve files, and why."""


def test_no_class_name_stands_twice():
    where = defaultdict(list)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                where[node.name].append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_no_file_is_long_and_no_folder_is_full():
    long = {str(file.relative_to(ROOT)) for file in FILES if len(file.read_text().splitlines()) > 500}
    assert long == {"aurora_jax/api.py"}  # two classes and two functions: more than half is their docstrings
    folders = {file.parent for file in FILES}
    sizes = {folder: sum(file.name != "__init__.py" for file in folder.glob("*.py")) for folder in folders}
    assert {str(folder.relative_to(ROOT)) for folder, size in sizes.items() if size > 12} == set(FULL)


def test_there_is_no_lumber_room():
    assert [file for file in FILES if file.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_every_path_on_the_page_is_in_the_tree():
    """Whole paths as they stand; a file's name alone is in a folder that its paragraph names, or is a face's."""
    named = 0
    for paragraph in re.split(r"\n(?=\S)", PAGE.read_text()):
        paths = re.findall(r"`([\w./-]*(?:/|\.py))`", paragraph)
        whole = [path for path in paths if "/" in path]
        assert [path for path in whole if not (ROOT / path).exists()] == []
        folders = {ROOT / path if path.endswith("/") else (ROOT / path).parent for path in whole} | {
            ROOT / "aurora_jax"
        }
        for name in set(paths) - set(whole):
            assert any((folder / name).is_file() for folder in folders), (
                f"{name}: in none of the folders of its paragraph"
            )
        named += len(paths)
    assert named > 40


def test_every_room_is_on_the_page():
    page = PAGE.read_text()
    rooms = {path.parent for path in (ROOT / "aurora_jax").glob("*/__init__.py")}
    assert [room.name for room in rooms if f"aurora_jax/{room.name}/" not in page] == []
    wings = {path.parent for path in (ROOT / "aurora_jax" / "data").glob("*/__init__.py")}
    assert [wing.name for wing in wings if f"aurora_jax/data/{wing.name}/" not in page] == []
