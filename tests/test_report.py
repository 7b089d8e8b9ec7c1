"""The report: its numbers are those of the run, its page stands alone, and promises are checked at their bounds."""

import json
import re
from pathlib import Path

import pytest

from aurora_jax.errors import InputError
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.evaluate.report import LanguageChange, before_after, check_expectations, summary, write_report

LANGUAGES = ("en", "code", "fi", "hi", "ja", "vi")
BEFORE = dict(zip(LANGUAGES, (2.0, 1.5, 6.0, 4.0, 9.0, 8.0), strict=True))
AFTER = dict(zip(LANGUAGES, (2.04, 1.47, 3.0, 2.0, 3.0, 2.0), strict=True))


def evaluation(step: int, stage: str, values: dict[str, float], complete: bool = True) -> dict:
    scores = {f"sample_{language}": {"loss": value, "bits_per_byte": value, "tokens": 10} for language, value in values.items()}
    return {"step": step, "stage": stage, "complete": complete, "evaluation": scores}


def training(step: int, stage: str, loss: float = 3.0) -> dict:
    prefix = "sample_clean" if stage == "cat" else "sample"
    scalars = {"loss": loss, "gradient_norm": 1.0, "learning_rate": 1e-3, "accepted": 1.0, "tokens": 64.0, "skipped": 0.0}
    return {
        "step": step,
        "stage": stage,
        **scalars,
        "tokens_per_second": 100.0,
        "task_loss": {f"{prefix}_{code}": loss for code in LANGUAGES},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [evaluation(0, "start", BEFORE), *(training(step, "cap") for step in range(6)), evaluation(3, "cap", AFTER, complete=False)]
    rows += [evaluation(6, "cap", AFTER | {"fi": 3.5}), *(training(step, "cat") for step in range(6, 9)), evaluation(9, "cat", AFTER)]
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


def test_page_has_the_numbers_and_stands_alone(run, tmp_path):
    samples = tmp_path / "samples.json"
    samples.write_text(
        json.dumps([{"language": "hi", "prompt": "नमस्ते", "before": "<script>alert(1)</script>", "after": "दुनिया"}], ensure_ascii=False)
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
