"""`aurora report`: one self-contained page that says what a run has learnt and what it has kept."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from aurora_jax.errors import InputError
from aurora_jax.evaluate.charts import (
    before_after_bars,
    bits_per_byte_curves,
    learning_rate_curve,
    loss_curves,
    name_of_subject,
)
from aurora_jax.evaluate.evaluations import described, differing_settings, require_one_run, settings_groups, start_of
from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.evaluate.run_record import RunRecord, read_run_record
from aurora_jax.languages import CODE, in_order, name_of
from aurora_jax.storage.atomic import write_file
from aurora_jax.storage.places import Place, absolute_place, place_of

UNKNOWN_RUN = RunRecord()

CSS = """
:root { color-scheme: light dark; --text: #1c2024; --faint: #60646c; --line: #e0e1e6; --good: #18794e; --bad: #c62a2f;
  --page: #fff; --soft: #f6f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --text: #edeef0; --faint: #b0b4ba; --line: #363a3f; --good: #4cc38a; --bad: #ff8589;
    --page: #18191b; --soft: #212225 }
}
body { font: 16px/1.55 system-ui, "Noto Sans", "Noto Sans Devanagari", "Noto Sans CJK JP", sans-serif;
  color: var(--text); background: var(--page); max-width: 54rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem }
p { margin: .4rem 0 } .lead { font-size: 1.1rem } .faint { color: var(--faint); font-size: .9rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
@media (max-width: 30rem) { th, td { padding: .35rem .2rem; font-size: .85rem } th { white-space: normal } }
th:first-child, td:first-child { text-align: left } th { color: var(--faint); font-weight: 600; font-size: .85rem }
.good { color: var(--good); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
.kept { font-weight: 600 }
img { width: 100%; height: auto; background: #fff; border-radius: 8px; margin: .5rem 0 }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; margin: .7rem 0 }
.sample .prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; margin-top: .5rem }
.pair div { white-space: pre-wrap; overflow-wrap: anywhere }
.pair b { display: block; color: var(--faint); font-size: .8rem; font-weight: 600 }
pre { background: var(--soft); padding: .8rem; border-radius: 8px; overflow-x: auto; font-size: .85rem }
@media (max-width: 40rem) { th, td { padding: .35rem .4rem } }
@media print { body { max-width: none } img { break-inside: avoid } }
"""


@dataclass(frozen=True)
class LanguageChange:
    """Bits per byte of one language's held-out text over a run."""

    task: str
    subject: str
    """The language, and the task where several are of one: see `charts.Curves`."""
    before: float
    stages: dict[str, float]
    """At the end of each stage, in order."""

    @property
    def language(self) -> str:
        """Its tag."""
        return self.subject.partition("/")[0]

    @property
    def name(self) -> str:
        return name_of_subject(self.subject)

    @property
    def after(self) -> float:
        return next(reversed(self.stages.values()))

    @property
    def change(self) -> float:
        """Relative: -0.5 where the bits have halved."""
        return self.after / self.before - 1


@dataclass(frozen=True)
class ReportCommand:
    """Writes report.html for a training run: a table before and after, charts, and continuations if there are any."""

    run_directory: tyro.conf.Positional[Path]
    """The run's folder (its --output)."""
    output: Path | None = None
    """The page to write; RUN_DIRECTORY/report.html without it. Its charts lie beside it as PNG files."""
    samples: Path | None = None
    """JSON file with continuations: a list of {"language", "prompt", "before", "after"}."""

    def run(self) -> None:
        """Raises InputError if the folder is not that of a run."""
        run = place_of(self.run_directory)
        output = run / "report.html" if self.output is None else place_of(self.output)
        for sentence in write_report(run, output, samples=self.samples):
            print(sentence)
        print(f"wrote {output}")


def before_after(rows: Sequence[Mapping], record: RunRecord = UNKNOWN_RUN) -> list[LanguageChange]:
    """What complete evaluations say, language by language: that of the start against those at the stages' ends,
    measured alike.

    Languages without such a pair are left out, all of them where the start is missing; `not_compared` has the reasons.

    Args:
        rows: of metrics.jsonl.
        record: of the run, which knows the languages of its tasks.
    """
    start = start_of(rows, complete=True)
    if start is None:
        return []
    ends = _ends(rows)
    subjects = record.subjects(start["evaluation"])
    changes = [
        LanguageChange(
            task=task,
            subject=subjects[task],
            before=score["bits_per_byte"],
            stages={
                row["stage"]: row["evaluation"][task]["bits_per_byte"]
                for row in ends
                if task in row["evaluation"] and not differing_settings(start, row, task)
            },
        )
        for task, score in start["evaluation"].items()
    ]
    return [change for change in changes if change.stages]


def not_compared(rows: Sequence[Mapping]) -> list[str]:
    """A sentence for each thing that keeps evaluations of the stages' ends from being held against the start."""
    start, ends = start_of(rows, complete=True), _ends(rows)
    if not ends:
        return []
    if start is None:
        return [
            "There is no before and after: metrics.jsonl lacks the evaluation of all held-out text before the "
            "first step (step 0), "
            f"and that of step {ends[0]['step']}, after stage {ends[0]['stage']}, cannot stand for it."
        ]
    said = []
    for row in ends:
        for task in row["evaluation"]:
            what = f"{task} after step {row['step']} is not held against the start"
            if task not in start["evaluation"]:
                said.append(f"{what}: it was not measured there.")
            elif found := differing_settings(start, row, task):
                values = "; ".join(f"{name} {one} there, {other} here" for name, (one, other) in found.items())
                said.append(f"{what}: it was measured otherwise ({values}).")
        said += [
            f"{task} was not measured after step {row['step']}, as it was at the start."
            for task in start["evaluation"]
            if task not in row["evaluation"]
        ]
    return said


def _ends(rows: Sequence[Mapping]) -> list[Mapping]:
    return [row for row in rows if row.get("complete") and row["step"] > 0]


def check_expectations(
    changes: Sequence[LanguageChange],
    *,
    learnt: Sequence[str],
    kept: Sequence[str],
    least_fall: float = 0.25,
    largest_rise: float = 0.03,
) -> list[str]:
    """A sentence for every task that did not do as expected: `learnt` ones fall at least so much, `kept` ones rise at
    most so much. Both are those of the run's record."""
    found = {change.task: change for change in changes}
    missed = [f"{task} was not evaluated before and after." for task in (*learnt, *kept) if task not in found]
    for tasks, most, expected in (
        (learnt, 1 - least_fall, f"a fall of at least {least_fall:.0%}"),
        (kept, 1 + largest_rise, f"a rise of at most {largest_rise:.0%}"),
    ):
        for change in (found[task] for task in tasks if task in found):
            if not change.after <= change.before * most:
                missed.append(f"{change.name} changed by {change.change:+.1%}; {expected} was expected.")
    return missed


def write_report(
    run_directory: Place, output: Place, *, samples: Path | None = None, commands: Sequence[str] = ()
) -> list[str]:
    """Writes the page, and its charts as PNG files beside it.

    Args:
        samples: JSON list of {"language", "prompt", "before", "after"}.
        commands: what was typed to make the run; printed for those who want to do it again.

    Returns:
        What could not be compared, and why; the page says it, too.

    Raises:
        InputError: the folder has no metrics, or those of more than one run, or the samples cannot be read.
    """
    rows = read_metrics(run_directory / "metrics.jsonl")
    require_one_run(rows, run_directory / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise InputError(
            f"{run_directory / 'metrics.jsonl'}: no training step has been recorded yet; let the run go on a little."
        )
    record = read_run_record(run_directory)
    changes = before_after(rows, record)
    boundaries = stage_ends(steps)
    name = absolute_place(run_directory).name
    parts = [f"<h1>{html.escape(name)}: what was learnt, what was kept</h1>"]
    charts: dict[str, Figure] = {}
    if changes:
        charts["before_after"] = before_after_bars(
            {change.subject: change.before for change in changes},
            {change.subject: change.after for change in changes},
        )
        parts += [f'<p class="lead">{html.escape(summary(changes))}</p>', _table(changes, record)]
        if not record.kept:
            parts.append('<p class="faint">The run does not say what it was to keep (evaluation.keep).</p>')
        parts.append(
            '<p class="faint">Bits per byte: how many bits the model needs to encode one byte of text that it '
            "has never been trained on. "
            "It can be compared across tokenizers; 8 is what guessing every byte blindly costs.</p>"
        )
        parts.append(_image(charts["before_after"], "Bits per byte before and after, by language"))
    missing = not_compared(rows)
    parts += [f'<p class="bad">{html.escape(sentence)}</p>' for sentence in missing]
    for number, (measured, curves) in enumerate(evaluation_curves(rows, record).items(), start=1):
        name_of_chart = "bits_per_byte" if number == 1 else f"bits_per_byte_{number}"
        charts[name_of_chart] = bits_per_byte_curves(curves, boundaries)
        parts += ["<h2>While it learnt</h2>"] if number == 1 else []
        parts += [
            f'<p class="faint">{html.escape(measured)}</p>',
            _image(charts[name_of_chart], f"Bits per byte over steps: {measured}"),
        ]
    charts["loss"] = loss_curves(training_loss_curves(steps, record), boundaries)
    charts["learning_rate"] = learning_rate_curve(
        [row["step"] for row in steps], [row["learning_rate"] for row in steps], boundaries
    )
    parts += [
        "<h2>Training</h2>",
        _image(charts["loss"], "Training loss by language"),
        _image(charts["learning_rate"], "Learning rate"),
    ]
    parts.append(_facts(steps))
    parts += _goodput(rows)
    if written := _samples_of_run(rows):
        parts += ["<h2>What it wrote on the way</h2>", *written]
    if samples is not None:
        parts += ["<h2>How it goes on with a text</h2>", *_samples(samples)]
    if commands:
        parts += ["<h2>To do it again</h2>", f"<pre>{html.escape(chr(10).join(commands))}</pre>"]

    output.parent.mkdir(parents=True, exist_ok=True)
    for chart, figure in charts.items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        write_file(output.parent / f"{chart}.png", picture.getvalue())
    title = html.escape(f"{name}: what was learnt, what was kept")
    write_file(
        output,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n",
    )
    return missing


def summary(changes: Sequence[LanguageChange]) -> str:
    """One sentence in plain words: who fell, and what became of the others."""
    fell = [change for change in changes if change.change <= -0.1]
    others = [change for change in changes if change.change > -0.1]
    sentences = []
    if fell:
        falls = sorted(-change.change for change in fell)
        span = (
            f"{falls[0]:.0%}"
            if len(falls) == 1 or f"{falls[0]:.0%}" == f"{falls[-1]:.0%}"
            else f"{falls[0] * 100:.0f} to {falls[-1]:.0%}"
        )
        sentences.append(f"{_listed([change.name for change in fell])} fell by {span} in bits per byte")
    if others:
        sentences.append(
            _listed([f"{change.name} changed by {change.change:+.1%}".replace("-", "−") for change in others])
        )
    return "; ".join(sentences) + "."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _table(changes: Sequence[LanguageChange], record: RunRecord) -> str:
    stages = list(dict.fromkeys(stage for change in changes for stage in change.stages))
    head = "".join(
        f"<th>{html.escape(title)}</th>" for title in ("", "before", *(f"after {stage}" for stage in stages), "change")
    )
    groups = {
        "to be kept": [change for change in changes if change.task in record.kept],
        "to be learnt": [change for change in changes if change.task in record.learnt],
        "measured": [change for change in changes if change.task not in (*record.kept, *record.learnt)],
    }
    body = ""
    for title, group in groups.items():
        if group and record.kept:
            body += f'<tr><th colspan="{len(stages) + 3}">{title}</th></tr>'
        for change in group:
            fell, stayed = change.change <= -0.1, change.change <= 0.03 and title != "to be learnt"
            quality = "good" if fell else "kept" if stayed else "bad"
            cells = [
                f"{change.before:.3f}",
                *(f"{change.stages[stage]:.3f}" if stage in change.stages else "" for stage in stages),
            ]
            body += f"<tr><td>{html.escape(change.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            body += f'<td class="{quality}">{f"{change.change:+.1%}".replace("-", "−")}</td></tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _goodput(rows: Sequence[Mapping]) -> list[str]:
    """Where the time went, from the newest row that says so."""
    row = next((row for row in reversed(rows) if "goodput" in row), None)
    if row is None:
        return []
    whole = sum(row["seconds"].values()) or 1.0
    spent = sorted(row["seconds"].items(), key=lambda item: -item[1])
    cells = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td>"
        f"<td>{seconds:,.1f} s</td><td>{seconds / whole:.1%}</td></tr>"
        for name, seconds in spent
    )
    said = f"Goodput {row['goodput']:.1%}: the share of the time since the first start, until step {row['step']:,}, in "
    return [
        "<h2>Where the time went</h2>",
        f'<p class="faint">{said}which steps were done that counted. The rest was lost to what stands below.</p>',
        f'<div class="scroll"><table><tbody>{cells}</tbody></table></div>',
    ]


def _facts(steps: Sequence[Mapping]) -> str:
    tokens = sum(row["tokens"] for row in steps)
    wanted = steps[-1]["step"] + 1
    facts = [
        f"{len(steps):,} steps"
        if len(steps) == wanted
        else f"{len(steps):,} of {wanted:,} steps: metrics.jsonl lacks the others",
        f"{tokens:,.0f} tokens",
        f"{steps[-1]['tokens_per_second']:,.0f} tokens/s",
        f"{steps[-1]['skipped']:.0f} updates skipped",
    ]
    return f'<p class="faint">{" · ".join(facts)}</p>'


def _samples(path: Path) -> list[str]:
    try:
        samples = json.loads(path.read_text(encoding="utf-8-sig"))
        return [
            _sample(each["language"], each["prompt"], {title: each[title] for title in ("before", "after")})
            for each in samples
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f'{path}: not a list of {{"language", "prompt", "before", "after"}}: {error}') from error


def _samples_of_run(rows: Sequence[Mapping]) -> list[str]:
    """The continuations of a run's own prompts (`evaluation.prompts`), beside each other from the start to the end."""
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        for each in row.get("samples", ()):
            title = f"after {row['stage']}" if row["step"] else "before"
            texts.setdefault((each["language"], each["prompt"]), {})[title] = each["continuation"]
    return [_sample(language, prompt, written) for (language, prompt), written in texts.items()]


def _sample(language: str, prompt: str, texts: Mapping[str, str]) -> str:
    """A prompt, and its continuations side by side under their titles."""
    code = language == CODE
    attributes = ' style="font-family: ui-monospace, monospace"' if code else f' lang="{html.escape(language)}"'
    pair = "".join(
        f"<div{attributes}><b>{html.escape(title)}</b>{html.escape(text)}</div>" for title, text in texts.items()
    )
    name = html.escape(name_of(language))
    shown = f'<div class="prompt"{attributes}>{html.escape(prompt)}</div><div class="pair">{pair}</div>'
    return f'<div class="sample"><span class="faint">{name}</span>{shown}</div>'


def evaluation_curves(
    rows: Sequence[Mapping], record: RunRecord
) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """How it was measured -> subject -> steps and values: of quick evaluations only, if there are some, which read
    less text than complete ones. What was measured otherwise is on another chart."""
    evaluations = [row for row in rows if "evaluation" in row]
    drawn = [row for row in evaluations if not row["complete"]] or evaluations
    charts: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for task, subject in record.subjects(dict.fromkeys(task for row in drawn for task in row["evaluation"])).items():
        for number, group in enumerate(settings_groups(drawn, task), start=1):
            measured = described(group[0]) if number == 1 else f"{described(group[0])} (settings {number})"
            steps, values = [row["step"] for row in group], [row["evaluation"][task]["bits_per_byte"] for row in group]
            charts.setdefault(measured, {})[subject] = (steps, values)
    return charts


def stage_ends(steps: Sequence[Mapping]) -> dict[str, int]:
    """Stage -> the step after its last one, of the rows of training steps."""
    stages = dict.fromkeys(row["stage"] for row in steps)
    return {stage: max(row["step"] for row in steps if row["stage"] == stage) + 1 for stage in stages}


def training_loss_curves(steps: Sequence[Mapping], record: RunRecord) -> dict[str, tuple[list[float], list[float]]]:
    """Language -> steps and training loss, the mean of those of its tasks that the batch had, of the rows of training
    steps."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in steps:
        for task, loss in row["task_loss"].items():
            found.setdefault(record.language(task), {}).setdefault(row["step"], []).append(loss)
    return {
        language: (list(found[language]), [sum(losses) / len(losses) for losses in found[language].values()])
        for language in in_order(found)
    }


def _image(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return (
        f'<img alt="{html.escape(description)}" '
        f'src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )
