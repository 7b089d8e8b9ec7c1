"""The notebook runs from top to bottom, in git without its outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "aurora_colab.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: nbformat.NotebookNode, **parameters: str) -> nbformat.NotebookNode:
    """Runs all cells, with other values in the cell that is tagged `parameters`; a cell that raises fails the
    test with its output."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source = "\n".join([cell.source, *(f"{name} = {value}" for name, value in parameters.items())])
    return NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def scores(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Bits per byte by language before a run's first step and after its last."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    complete = [row["evaluation"] for row in rows if row.get("complete")]
    first, last = (
        {task.removeprefix("sample_"): score["bits_per_byte"] for task, score in each.items()} for each in complete
    )
    return first, last


def test_outputs_are_stripped(notebook):
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_it_runs_from_top_to_bottom(notebook, mini_corpus, tmp_path):
    """On the miniature corpus, for a few steps: every cell, every command, both figures."""
    done = execute(notebook, STEPS="6", WORK=f"Path({str(tmp_path)!r})", CORPUS=f"Path({str(mini_corpus)!r})")
    outputs = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("<iframe" in output.get("data", {}).get("text/html", "") for output in outputs)
    for run in ("without_replay", "with_replay"):
        first, last = scores(tmp_path / run)
        assert all(last[language] < first[language] for language in ("fi", "hi", "ja", "vi"))
    assert (tmp_path / "aurora-nano" / "model.safetensors").is_file()


@pytest.mark.full
def test_its_story_is_true(notebook, tmp_path):
    """As it ships, on the sample corpus: both runs learn, and only the one without replay forgets."""
    execute(notebook, WORK=f"Path({str(tmp_path)!r})", CORPUS="WORK / 'corpus'")
    first, alone = scores(tmp_path / "without_replay")
    _, replayed = scores(tmp_path / "with_replay")
    for language in ("fi", "hi", "ja", "vi"):
        assert alone[language] < 0.7 * first[language]
        assert replayed[language] < 0.7 * first[language]
    for language in ("en", "code"):
        assert alone[language] > 1.15 * first[language]
        assert replayed[language] < 1.1 * first[language]
