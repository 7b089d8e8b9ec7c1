"""The whole journey, small and real, on a CPU: `make quickstart`.

A StarCoder-family PyTorch checkpoint that reads English and code (`examples/nano`, which stands for
StarCoderPlus) becomes a Flax model, learns Finnish, Hindi, Japanese and Vietnamese in two stages, and leaves
again as a PyTorch checkpoint. Every step is a command that you could type yourself; it is printed before it
runs. The exit status is not 0 if a step fails or the result is not as promised.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from aurora_jax.evaluate.metrics_file import read_metrics
from aurora_jax.evaluate.report import before_after, check_expectations, write_report
from aurora_jax.evaluate.run_record import read_run_record
from aurora_jax.storage import json_lines

ROOT = Path(__file__).resolve().parents[1]
WORK = Path("quickstart")
NANO = Path("examples/nano")
CONVERTED, RUN, RESULT = WORK / "nano-flax", WORK / "run", WORK / "aurora-nano"
LANGUAGES = ("en", "code", "fi", "hi", "ja", "vi")
PROMPT_CHARACTERS = {"hi": 60, "ja": 30}
NEW_TOKENS = 60

STEPS = (
    ("A real corpus in five languages and code, from packages", f"-m aurora_jax data sample {WORK}/corpus"),
    (
        "Text becomes tokens: the stores of both stages' mixtures, and of the held-out texts",
        f"-m aurora_jax data build nano_cap nano_cat --tokenizer {NANO} --data-root {WORK}/corpus --output "
        f"{WORK}/stores "
        "--splits train validation",
    ),
    (
        "PyTorch weights in: the base model becomes a Flax checkpoint",
        f"-m convert from-torch {NANO} {CONVERTED} --dtype float32",
    ),
    ("Are the two the same model?", f"-m convert verify {NANO} {CONVERTED}"),
    (
        "Continual pretraining: stage CAP (all languages, English and code replayed), then stage CAT (cleaner texts)",
        f"-m aurora_jax train configs/nano_aurora.py --data.corpus {WORK}/corpus --data.stores {WORK}/stores "
        f"--initial-checkpoint {CONVERTED} --output {RUN}",
    ),
    ("PyTorch weights out", f"-m convert to-torch {RUN}/stages/cat {RESULT}"),
    ("Are the two the same model?", f"-m convert verify {RUN}/stages/cat {RESULT}"),
)


def main() -> int:
    """Runs the journey from the repository's root; returns the exit status."""
    console = Console(highlight=False)
    begun = time.monotonic()
    for path in (CONVERTED, RUN, RESULT):
        shutil.rmtree(ROOT / path, ignore_errors=True)
    commands = []
    for number, (title, arguments) in enumerate(STEPS, start=1):
        commands.append(f"python {arguments}")
        console.print(
            f"\n[bold][{number}/{len(STEPS) + 2}] {title}[/bold]\n[dim]$ {commands[-1]}[/dim]", soft_wrap=True
        )
        status = subprocess.run([sys.executable, *shlex.split(arguments)], cwd=ROOT).returncode
        if status:
            console.print(f"[red]step {number} failed with exit status {status}[/red]: {commands[-1]}", soft_wrap=True)
            return status

    console.print(
        f"\n[bold][{len(STEPS) + 1}/{len(STEPS) + 2}] A continuation in every language, by transformers[/bold]"
    )
    samples = continuations(ROOT / WORK / "corpus" / "heldout", ROOT / NANO, ROOT / RESULT)
    samples_file = ROOT / WORK / "samples.json"
    samples_file.write_text(json.dumps(samples, ensure_ascii=False, indent=1), encoding="utf-8")
    for sample in samples:
        console.print(
            f"[cyan]{sample['language']:>4}[/cyan] {sample['prompt']}[green]{sample['after']}[/green]", markup=True
        )

    console.print(f"\n[bold][{len(STEPS) + 2}/{len(STEPS) + 2}] What was learnt, what was kept[/bold]")
    report = ROOT / WORK / "report.html"
    for sentence in write_report(ROOT / RUN, report, samples=samples_file, commands=commands):
        console.print(f"[red]{sentence}[/red]", soft_wrap=True)
    record = read_run_record(ROOT / RUN)
    changes = before_after(read_metrics(ROOT / RUN / "metrics.jsonl"), record)
    table = Table("language", "before", "after", "change")
    for change in changes:
        table.add_row(change.name, f"{change.before:.3f}", f"{change.after:.3f}", f"{change.change:+.1%}")
    console.print("bits per byte of held-out text (lower is better):", table)
    minutes = (time.monotonic() - begun) / 60
    console.print(
        f"{minutes:.1f} minutes. Look at [bold]{report.relative_to(ROOT)}[/bold]; the model is in "
        f"[bold]{RESULT}[/bold].",
        soft_wrap=True,
    )
    console.print(
        f'[dim]$ python -m aurora_jax generate {RUN} "Helsinki on" --temperature 0.7[/dim]   lets it write.',
        soft_wrap=True,
    )
    missed = check_expectations(changes, learnt=record.learnt, kept=record.kept)
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
    sys.exit(main())
