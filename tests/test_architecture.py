"""What DESIGN says of the house and import contracts cannot: one meaning a name, no room too full, no lumber room."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [file for room in ("aurora_jax", "convert") for file in sorted((ROOT / room).rglob("*.py"))]
FULL = {
    "aurora_jax/launch": "one small command for any machine: its parts belong together, and none has 350 lines",
    "aurora_jax/train": "the run, its state and its records; checkpoints, guard and goodput are to leave it",
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
    assert [str(file) for file in FILES if len(file.read_text().splitlines()) > 500 and "api.py" not in str(file)] == []
    folders = {file.parent for file in FILES}
    sizes = {folder: sum(file.name != "__init__.py" for file in folder.glob("*.py")) for folder in folders}
    assert {str(folder.relative_to(ROOT)) for folder, size in sizes.items() if size > 12} == set(FULL)


def test_there_is_no_lumber_room():
    assert [file for file in FILES if file.stem in ("utils", "util", "helpers", "misc", "common")] == []
