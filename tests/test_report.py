"""The report: its numbers are those of the run, its page stands alone, and promises are checked at their bounds."""

import json
import re
from functools import partial
from pathlib import Path

import pytest

from aurora_jax.errors import InputError
from aurora_jax.evaluate.charts import before_after_bars, bits_per_byte_curves
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
from aurora_jax.evaluate.run_record import RunRecord, read_run_record, record_of
from aurora_jax.languages import TABLE

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
    changes = {change.subject: change for change in before_after(read_metrics(run / "metrics.jsonl"))}
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
    assert check_expectations(
        before_after(read_metrics(run / "metrics.jsonl")), learnt=["sample_fi"], kept=["sample_en"]
    ) == ["sample_fi was not evaluated before and after.", "sample_en was not evaluated before and after."]


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
    found = {change.subject: change.stages for change in before_after(read_metrics(run / "metrics.jsonl"))}
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
    curves = evaluation_curves(read_metrics(run / "metrics.jsonl"), RunRecord())
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
    return LanguageChange(f"sample_{language}", language, 1.0, {"cat": 1.0 + relative})


def test_promises_are_checked_at_their_bounds():
    kept = [change("en", 0.03), change("code", -0.1)]
    learnt = [change(language, -0.25) for language in ("fi", "hi", "ja", "vi")]
    check = partial(check_expectations, learnt=[each.task for each in learnt], kept=[each.task for each in kept])
    assert check(kept + learnt) == []
    assert len(check([change("en", 0.0301), *kept[1:], *learnt])) == 1
    assert "Vietnamese" in check([*kept, *learnt[:3], change("vi", -0.2499)])[0]
    assert "sample_fi" in check([*kept, *learnt[1:]])[0]
    assert len(check([*kept, change("fi", float("nan")), *learnt[1:]])) == 1
    assert check_expectations([change("fi", 9.0)], learnt=[], kept=[]) == []


def test_summary_is_a_sentence(run):
    said = summary(before_after(read_metrics(run / "metrics.jsonl")))
    assert said.startswith("Finnish, Hindi, Japanese and Vietnamese fell by 50 to 75%")
    assert said.endswith("English changed by +2.0% and Code changed by −2.0%.")


def facts(keep: list[str], languages: dict[str, str], trained: list[str], held_out: list[str]) -> dict:
    rates = {task: 1 / len(trained) for task in trained}
    stages = [{"name": "cap", "rates": {}}, {"name": "cat", "rates": rates}]
    return {
        "keep": keep,
        "languages": languages,
        "stages": stages,
        "held_out": {task: {"windows": 1} for task in held_out},
    }


def test_what_was_to_be_learnt_and_kept_follows_from_the_run():
    """Kept is what it names; learnt, what else it is judged on in a language of its stage table."""
    languages = {"swahili": "sw", "my_web": "sw", "sample_en": "en", "pile": "en", "sample_ja": "ja"}
    judged = ["sample_en", "swahili", "pile", "sample_ja"]
    record = record_of(facts(["sample_en"], languages, ["my_web", "sample_en"], judged))
    assert (record.learnt, record.kept) == (("swahili",), ("sample_en",))
    nothing_named = record_of(facts([], languages, ["my_web", "sample_en"], judged))
    assert (nothing_named.learnt, nothing_named.kept) == ((), ())
    assert nothing_named.languages == languages


def test_texts_of_one_language_are_told_apart():
    record = RunRecord({"wiki_sw": "sw", "web_sw": "sw", "sample_clean_fi": "fi", "notes": "und"})
    tasks = ["wiki_sw", "web_sw", "sample_clean_fi", "notes", "sample_en"]
    assert list(record.subjects(tasks).values()) == ["sw/wiki_sw", "sw/web_sw", "fi", "notes", "en"]
    figure = bits_per_byte_curves({subject: ([0, 1], [2.0, 1.0]) for subject in record.subjects(tasks).values()}, {})
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == [
        "Swahili (wiki_sw)",
        "Swahili (web_sw)",
        "Finnish",
        "notes",
        "English",
    ]
    assert lines[0].get_color() == lines[1].get_color()
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    assert len({line.get_color() for line in lines}) == 4
    assert [lines[place].get_color() for place in (2, 4)] == [TABLE["fi"].colour, TABLE["en"].colour]


def test_a_language_that_nobody_foresaw_is_in_every_chart_and_table(run):
    """Swahili, by a task of somebody's module, beside English; the groups are those that the run names."""

    def change(rows):
        text = json.dumps(rows).replace("sample_clean_fi", "my_swahili").replace("sample_fi", "my_swahili")
        return json.loads(text)

    rewritten(run, change)
    languages = {"my_swahili": "sw"}
    trained = [f"sample_{language}" for language in LANGUAGES if language != "fi"]
    held_out = ["my_swahili", *trained]
    said = facts(["sample_en", "sample_code"], languages, ["my_swahili", *trained[:3]], held_out)
    (run / "run.json").write_text(json.dumps(said))
    assert write_report(run, run / "report.html") == []
    page = (run / "report.html").read_text()
    groups = re.split(r"<tr><th colspan=[^>]*>([^<]*)</th></tr>", page)
    assert groups[1::2] == ["to be kept", "to be learnt", "measured"]
    names = [re.findall(r"<tr><td>([^<]*)</td>", group) for group in groups[2::2]]
    assert names == [["English", "Code"], ["Swahili", "Hindi"], ["Japanese", "Vietnamese"]]
    assert "does not say what it was to keep" not in page
    changes = before_after(read_metrics(run / "metrics.jsonl"), read_run_record(run))
    bars = before_after_bars(*({each.subject: getattr(each, when) for each in changes} for when in ("before", "after")))
    assert "Swahili" in [label.get_text() for label in bars.axes[0].get_xticklabels()]


def test_a_learnt_language_that_did_not_fall_is_marked(run):
    (run / "run.json").write_text(
        json.dumps(facts(["sample_en"], {}, ["sample_code", "sample_en"], ["sample_en", "sample_code"]))
    )
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text()
    assert re.search(r"<td>Code</td>.*?<td class=\"bad\">−2.0%</td>", page)
    assert re.search(r"<td>English</td>.*?<td class=\"kept\">\+2.0%</td>", page)


@pytest.mark.parametrize("content", [None, "{}", json.dumps({"stages": [], "held_out": {}})])
def test_runs_of_earlier_versions_have_a_report(run, content):
    if content is not None:
        (run / "run.json").write_text(content)
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text()
    assert "does not say what it was to keep" in page
    assert "<td>Finnish</td>" in page
    assert "colspan" not in page


@pytest.mark.parametrize("content", ["[]", "{", '{"keep": ["sample_en"]}', '{"keep": 3}'])
def test_facts_that_are_none_are_refused(run, content):
    (run / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json"):
        write_report(run, run / "report.html")


def test_continuations_of_a_run_stand_side_by_side(run):
    def change(rows):
        samples = {
            step: [{"language": "fi", "prompt": "Hei <b>", "continuation": f"text {step} &"}] for step in (0, 6, 9)
        }
        for row in [row for row in rows if row.get("complete")]:
            place = rows.index(row)
            rows.insert(place, {"step": row["step"], "stage": row["stage"], "samples": samples[row["step"]]})
        return rows

    rewritten(run, change)
    write_report(run, run / "report.html")
    page = (run / "report.html").read_text()
    assert page.count("Hei &lt;b&gt;") == 1
    found = re.findall(r"<b>(before|after \w+)</b>(text \d) &amp;", page)
    assert found == [("before", "text 0"), ("after cap", "text 6"), ("after cat", "text 9")]
