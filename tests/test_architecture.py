"""The page that says where everything lives names files and folders that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "explanation" / "architecture.md"


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
