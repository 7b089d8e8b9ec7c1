"""The report: its numbers are those of the run, its page stands alone, and promises are checked at their bounds."""

import json
import re
from pathlib import Path

import pytest

from aurora_jax.errors import InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.evaluate.report import (
    LanguageChange,
    before_after,
    check_expectations,
    evaluation_curves,
    not_compared,
    summary,
    write_report,
)

LANGUAGES = ("en", "code", "fi", "hi", "ja", "vi")
BEFORE = dict(zip(LANGUAGES, (2.0, 1.5, 6.0, 4.0, 9.0, 8.0), strict=True))
AFTER = dict(zip(LANGUAGES, (2.04, 1.47, 3.0, 2.0, 3.0, 2.0), strict=True))


def evaluation(step: int, stage: str, values: dict[str, float], complete: bool = True) -> dict:
    scores = {
        f"sample_{language}": {"loss": value, "bits_per_byte": value, "tokens": 10}
        for language, value in values.items()
    }
    return {"step": step, "stage": stage, "complete": complete, "evaluation": scores}


def training(step: int, stage: str, loss: float = 3.0) -> dict:
    prefix = "sample_clean" if stage == "cat" else "sample"
    scalars = {
        "loss": loss,
        "gradient_norm": 1.0,
        "learning_rate": 1e-3,
        "accepted": 1.0,
        "tokens": 64.0,
        "skipped": 0.0,
    }
    return {
        "step": step,
        "stage": stage,
        **scalars,
        "tokens_per_second": 100.0,
        "task_loss": {f"{prefix}_{code}": loss for code in LANGUAGES},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        evaluation(0, "start", BEFORE),
        *(training(step, "cap") for step in range(6)),
        evaluation(3, "cap", AFTER, complete=False),
    ]
    rows += [
        evaluation(6, "cap", AFTER | {"fi": 3.5}),
        *(training(step, "cat") for step in range(6, 9)),
        evaluation(9, "cat", AFTER),
    ]
    folder = tmp_path / "my <run>"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_before_and_after_are_the_complete_evaluations(run):
    changes = {change.language: change for change in before_after(read_metrics(run / "metrics.jsonl"))}
    assert {language: change.before for language, change in changes.items()} == BEFORE
    assert {language: change.after for language, change in changes.items()} == AFTER
    assert changes["fi"].stages == {"cap": 3.5, "cat": 3.0}
    assert changes["fi"].change == pytest.approx(-0.5)


def settings(windows: int | None = None, **other) -> dict:
    alike = {"sequence_length": 64, "attend_across_documents": True, "tokenizer_sha256": "t" * 64, "windows": windows}
    precision = {"compute_dtype": "float32", "activation_dtype": "float32"}
    return alike | precision | {"texts": {f"sample_{language}": "x" for language in LANGUAGES}} | other


def rewritten(run: Path, change) -> Path:
    """The rows of a run after `change`, which takes and gives a list."""
    rows = change(read_metrics(run / "metrics.jsonl"))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_end_of_a_stage_does_not_stand_for_the_start(run):
    """The first rows are gone: there is no before, and page and command say so."""
    rewritten(run, lambda rows: rows[1:])
    assert before_after(read_metrics(run / "metrics.jsonl")) == []
    (said,) = write_report(run, run / "report.html")
    assert (
        "lacks the evaluation of all held-out text before the first step (step 0), and that of step 6, after "
        "stage cap, cannot" in said
    )
    page = (run / "report.html").read_text()
    assert said in page
    assert "<table>" not in page
    assert not (run / "before_after.png").exists()
    assert "Finnish was not evaluated before and after." in check_expectations(
        before_after(read_metrics(run / "metrics.jsonl"))
    )


def test_steps_that_are_gone_are_missed(run):
    rewritten(run, lambda rows: [row for row in rows if row["step"] != 4])
    write_report(run, run / "report.html")
    assert "8 of 9 steps: metrics.jsonl lacks the others" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows + rows, "line 14: complete evaluation after step 0 comes after 9"),
        (lambda rows: rows + rows[1:2], "line 14: step 0 comes after 8"),
        (lambda rows: rows[:4] + rows[3:], "line 5: step 2 comes after 2"),
        (lambda rows: [*rows, evaluation(9, "cat", AFTER)], "line 14: complete evaluation after step 9 comes after 9"),
    ],
)
def test_rows_of_two_runs_are_refused(run, change, said):
    rewritten(run, change)
    with pytest.raises(InputError, match=said):
        write_report(run, run / "report.html")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sequence_length": 32}, "sequence_length 64 there, 32 here"),
        ({"attend_across_documents": False}, "attend_across_documents True there, False here"),
        ({"tokenizer_sha256": "u" * 64}, "tokenizer_sha256 "),
        ({"compute_dtype": "bfloat16"}, "compute_dtype float32 there, bfloat16 here"),
        (
            {"texts": {f"sample_{language}": "x" if language != "fi" else "y" for language in LANGUAGES}},
            "text x there, y here",
        ),
    ],
)
def test_figures_of_other_settings_are_not_compared(run, changed, said):
    """Those of the last stage: its column is empty for the languages concerned, and it is said why."""

    def change(rows):
        rows[0]["settings"], rows[8]["settings"], rows[-1]["settings"] = settings(), settings(), settings(**changed)
        return rows

    rewritten(run, change)
    found = {change.language: change.stages for change in before_after(read_metrics(run / "metrics.jsonl"))}
    alone = ("fi",) if "texts" in changed else LANGUAGES
    assert all(("cat" in stages) == (language not in alone) for language, stages in found.items())
    missing = not_compared(read_metrics(run / "metrics.jsonl"))
    assert len(missing) == len(alone)
    assert all(said in sentence and "step 9" in sentence for sentence in missing)


def test_a_curve_has_figures_of_equal_settings_only(run):
    """Quick evaluations of 2 and of 4 windows are two charts; complete ones are on neither."""

    def change(rows):
        quick = [evaluation(step, "cap", AFTER, complete=False) | {"settings": settings(2)} for step in (0, 2)]
        later = [evaluation(step, "cat", AFTER, complete=False) | {"settings": settings(4)} for step in (7, 8)]
        return quick[:1] + [row for row in rows if row.get("complete", True)] + quick[1:] + later

    rewritten(run, change)
    curves = evaluation_curves(read_metrics(run / "metrics.jsonl"))
    assert [steps for chart in curves.values() for steps, _ in [chart["fi"]]] == [[0, 2], [7, 8]]
    assert ["2 windows" in curves_of[0] or "4 windows" in curves_of[0] for curves_of in curves.items()] == [True, True]
    write_report(run, run / "report.html")
    assert {path.name for path in run.glob("bits*.png")} == {"bits_per_byte.png", "bits_per_byte_2.png"}


def test_page_has_the_numbers_and_stands_alone(run, tmp_path):
    samples = tmp_path / "samples.json"
    samples.write_text(
        json.dumps(
            [{"language": "hi", "prompt": "नमस्ते", "before": "<script>alert(1)</script>", "after": "दुनिया"}],
            ensure_ascii=False,
        )
    )
    write_report(run, tmp_path / "page" / "report.html", samples=samples, commands=["aurora train <config>"])
    page = (tmp_path / "page" / "report.html").read_text()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    rows = {cells[i]: cells[i + 1 : i + 5] for i in range(0, len(cells), 5)}
    assert rows["Finnish"] == ["6.000", "3.500", "3.000", "−50.0%"]
    assert rows["English"] == ["2.000", "2.040", "2.040", "+2.0%"]
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "my &lt;run&gt;" in page
    assert "aurora train &lt;config&gt;" in page
    assert '<div class="prompt" lang="hi">नमस्ते</div>' in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count('src="data:image/png;base64,') == 4
    assert {path.name for path in (tmp_path / "page").glob("*.png")} == {
        "before_after.png",
        "bits_per_byte.png",
        "loss.png",
        "learning_rate.png",
    }


def test_a_run_without_evaluations_or_with_nan_still_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(training(0, "cap", float("nan"))) + "\n" + '{"step": 1, "lo')
    write_report(tmp_path, tmp_path / "report.html")
    assert "data:image/png" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("content", [None, "", "not json\n{}\n", json.dumps(evaluation(0, "start", BEFORE)) + "\n"])
def test_what_is_no_run_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_samples_that_are_not_samples_are_refused(run, tmp_path):
    (tmp_path / "samples.json").write_text('[{"language": "fi"}]')
    with pytest.raises(InputError, match=r"samples\.json"):
        write_report(run, tmp_path / "report.html", samples=tmp_path / "samples.json")


def change(language: str, relative: float) -> LanguageChange:
    return LanguageChange(language, 1.0, {"cat": 1.0 + relative})


def test_promises_are_checked_at_their_bounds():
    kept = [change("en", 0.03), change("code", -0.1)]
    learnt = [change(language, -0.25) for language in ("fi", "hi", "ja", "vi")]
    assert check_expectations(kept + learnt) == []
    assert len(check_expectations([change("en", 0.0301), *kept[1:], *learnt])) == 1
    assert "Vietnamese" in check_expectations([*kept, *learnt[:3], change("vi", -0.2499)])[0]
    assert "Finnish" in check_expectations([*kept, *learnt[1:]])[0]
    assert len(check_expectations([*kept, change("fi", float("nan")), *learnt[1:]])) == 1


def test_summary_is_a_sentence(run):
    said = summary(before_after(read_metrics(run / "metrics.jsonl")))
    assert said.startswith("Finnish, Hindi, Japanese and Vietnamese fell by 50 to 75%")
    assert said.endswith("English changed by +2.0% and Code changed by −2.0%.")
