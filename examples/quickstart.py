"""The whole journey, small and real, on a CPU: `make quickstart`.

A StarCoder-family PyTorch checkpoint that reads English and code (`examples/nano`, which stands for
StarCoderPlus) becomes a Flax model, learns Finnish, Hindi, Japanese and Vietnamese in two stages, and leaves
again as a PyTorch checkpoint. Each step is a function below; its lines are printed before they run, and could be
yours. The exit status is not 0 if a step fails or the result is not as promised.
"""

import inspect
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

import aurora_jax as aurora
from aurora_jax.errors import InputError
from aurora_jax.evaluate.report import check_expectations
from aurora_jax.evaluate.run_record import read_run_record
from aurora_jax.storage import json_lines

if TYPE_CHECKING:
    from aurora_jax.api import Model, TrainingRun

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("quickstart")
LANGUAGES = ("en", "code", "fi", "hi", "ja", "vi")
PROMPT_CHARACTERS = {"hi": 60, "ja": 30}
NEW_TOKENS = 60
STEPS = 8

Result = TypeVar("Result")


# ---------------------------------------------------------------- The steps: VERB_RESULT


def build_corpus() -> Path:
    """A real corpus in five languages and code, from packages"""
    return aurora.sample_corpus("quickstart/corpus")


def load_model() -> "Model":
    """PyTorch weights in: the base model becomes a Flax checkpoint"""
    return aurora.load("examples/nano", checkpoint="quickstart/nano-flax", dtype="float32")


def are_same(one: Path, other: Path) -> bool:
    """Are the two the same model?"""
    from convert.verify import verify

    return verify(one, other)


def train_run(model: "Model", corpus: Path) -> "TrainingRun":
    """Continual pretraining: stage CAP (all languages, English and code replayed), then stage CAT (cleaner texts)"""
    from configs import nano_aurora

    config = nano_aurora.config()
    data = replace(config.data, corpus=str(corpus), stores="quickstart/stores")
    return model.train(replace(config, data=data, output=Path("quickstart/run")))


def save_folder(run: "TrainingRun") -> Path:
    """PyTorch weights out"""
    return run.model.save_torch("quickstart/aurora-nano")


# ---------------------------------------------------------------- The journey


class Journey:
    """Says which step comes, and what it runs.

    Attributes:
        lines: of all steps so far.
    """

    def __init__(self, console: Console):
        self.console = console
        self.lines: list[str] = []
        self._begun = 0

    def title(self, text: str) -> None:
        """The heading of the next step."""
        self._begun += 1
        self.console.print(f"\n[bold][{self._begun}/{STEPS}] {text}[/bold]", soft_wrap=True)

    def __call__(self, step: Callable[..., Result], *arguments: object) -> Result:
        """Prints the lines of a step and runs it."""
        self.title(inspect.getdoc(step) or "")
        body = inspect.getsource(step).split('"""')[-1]
        name = step.__name__.rpartition("_")[2]  # of what it gives back
        lines = [line.replace("return ", f"{name} = ", 1) for line in textwrap.dedent(body).splitlines() if line]
        self.lines += lines
        for line in lines:
            self.console.print(line, style="dim", soft_wrap=True, markup=False)
        return step(*arguments)


def main() -> int:
    """Runs the journey from the repository's root; returns the exit status."""
    os.chdir(ROOT)
    console = Console(highlight=False)
    begun = time.monotonic()
    for name in ("nano-flax", "run", "aurora-nano"):
        shutil.rmtree(WORK / name, ignore_errors=True)
    journey = Journey(console)
    corpus = journey(build_corpus)
    base = journey(load_model)
    same = journey(are_same, Path("examples/nano"), base.checkpoint)
    run = journey(train_run, base, corpus)
    result = journey(save_folder, run)
    if not (same and journey(are_same, run.model.checkpoint, result)):
        console.print("[red]They are not.[/red]")
        return 1

    journey.title("A continuation in every language, by transformers")
    samples = continuations(corpus / "heldout", Path("examples/nano"), result)
    samples_file = WORK / "samples.json"
    samples_file.write_text(json.dumps(samples, ensure_ascii=False, indent=1), encoding="utf-8")
    for sample in samples:
        console.print(
            f"[cyan]{sample['language']:>4}[/cyan] {sample['prompt']}[green]{sample['after']}[/green]", markup=True
        )

    journey.title("What was learnt, what was kept")
    report = run.report(WORK / "report.html", samples=samples_file, commands=journey.lines)
    table = Table("language", "before", "after", "change")
    for change in run.changes:
        table.add_row(change.name, f"{change.before:.3f}", f"{change.after:.3f}", f"{change.change:+.1%}")
    console.print("bits per byte of held-out text (lower is better):", table)
    minutes = (time.monotonic() - begun) / 60
    console.print(
        f"{minutes:.1f} minutes. Look at [bold]{report}[/bold]; the model is in [bold]{result}[/bold].", soft_wrap=True
    )
    console.print(
        f'[dim]$ python -m aurora_jax generate {run.output} "Helsinki on" --temperature 0.7[/dim]   lets it write.',
        soft_wrap=True,
    )
    record = read_run_record(run.output)
    missed = check_expectations(run.changes, learnt=record.learnt, kept=record.kept)
    for sentence in missed:
        console.print(f"[red]not as promised:[/red] {sentence}", soft_wrap=True)
    return 1 if missed else 0


def continuations(heldout: Path, before: Path, after: Path) -> list[dict[str, str]]:
    """How the base and the result go on with the beginning of a held-out text of every language.

    Returns:
        A dictionary for each language: language, prompt, and the new text of both models (`before`, `after`).

    Raises:
        RuntimeError: `transformers` found a missing or an unexpected weight.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    samples = [
        {"language": language, "prompt": _prompt(heldout / f"{language}.jsonl", language)} for language in LANGUAGES
    ]
    for name, folder in (("before", before), ("after", after)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if loading["missing_keys"] or loading["unexpected_keys"]:
            raise RuntimeError(f"{folder}: {loading}")
        for sample in samples:
            inputs = tokenizer(sample["prompt"], return_tensors="pt")
            torch.manual_seed(0)
            output = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                repetition_penalty=1.1,
                pad_token_id=0,
            )
            sample[name] = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return samples


def _prompt(path: Path, language: str) -> str:
    """The beginning of the last held-out document, cut at a word where there are spaces."""
    text = json_lines.read(path)[-1]["text"]
    if language == "code":
        return text[text.index("def ") :].split("\n")[0] + "\n"
    beginning = text.replace("\n", " ")[: PROMPT_CHARACTERS.get(language, 80)]
    return beginning if language == "ja" else beginning.rsplit(" ", 1)[0]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
