"""What the pages say that the code knows better: each command's --help, and the planned time and cost of
Aurora-M's stages.

A page asks for it with `<!-- help: aurora eval -->` or `<!-- stages: 2k -->`.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 84
"""Of text that fits into a page."""
STAGES = {"CAP": 377e9, "CAT": 58e9}
"""Tokens of Aurora-M's two stages (its authors' blog)."""
CHIPS_OF = {"v4_256": ("v4", 128), "v5e_256": ("v5e", 256), "v5p_128": ("v5p", 64), "v6e_256": ("v6e", 256)}
"""Configs of `configs/starcoderplus_*.py` that run on one slice, with their chips."""


def on_page_markdown(markdown: str, **page: object) -> str:
    """MkDocs calls this with each page's source."""
    markdown = re.sub(r"<!-- help: (.+?) -->", lambda found: f"```text\n{help_of(found[1].split())}\n```", markdown)
    return re.sub(r"<!-- stages: (\w+) -->", lambda found: stages_table(found[1]), markdown)


def help_of(command: list[str]) -> str:
    """What a command prints with --help; `aurora` and `python -m convert` in the process of the build, so
    that SeqIO and Beam load once."""
    if command[0] == "launch_tpu.sh":
        printed = subprocess.run(
            ["bash", *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        return narrowed(printed.rstrip())
    sys.path.insert(0, str(ROOT))
    os.environ["COLUMNS"] = str(COLUMNS)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from aurora_jax.cli import main as aurora
    from convert.__main__ import main as convert

    main, arguments = (aurora, command[1:]) if command[0] == "aurora" else (convert, command[3:])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit), contextlib.chdir(ROOT):
        main([*arguments, "--help"])
    if not printed.getvalue():
        raise ValueError(f"{' '.join(command)} --help prints nothing")
    return printed.getvalue().rstrip()


def narrowed(text: str) -> str:
    """Help folded to what fits into a page: paragraphs anew, explanations under the column where they begin,
    commands not at all."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and line[:1].strip() and lines[-1][:1].strip():
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return "\n".join(map(_folded, lines))


def _folded(line: str) -> str:
    if len(line) <= COLUMNS or line.lstrip().startswith(("./", "configs/")):
        return line
    column = re.match(r"\s*(?:\S+(?: \S+)*?\s{2,}(?:-> )?)?", line)
    assert column is not None  # it matches nothing, too
    return textwrap.fill(
        line, COLUMNS, subsequent_indent=" " * column.end(), break_on_hyphens=False, break_long_words=False
    )


def seconds_a_step(config: str) -> float:
    """The planned time of a step, out of a config's docstring, which has the command that found it."""
    found = re.search(r"([\d.]+) s a step", (ROOT / "configs" / f"starcoderplus_{config}.py").read_text())
    if found is None:
        raise ValueError(f"configs/starcoderplus_{config}.py: no planned time of a step in its docstring")
    return float(found[1])


def stages_table(length: str) -> str:
    """Days and dollars of each stage on each kind of chip, for sequences of 8,192 (`8k`) or 2,048 tokens (`2k`)."""
    from aurora_jax.chips import CHIPS
    from configs._starcoderplus import TOKENS

    stages = " | ".join(f"{stage}, {tokens / 1e9:.0f}B" for stage, tokens in STAGES.items())
    rows = [f"| | chips | s a step | {stages} | both | chip-hours | cost |", "| --- |" + " ---: |" * (len(STAGES) + 5)]
    for config, (generation, chips) in CHIPS_OF.items():
        seconds = seconds_a_step(config + ("_2k" if length == "2k" else ""))
        days = [tokens / TOKENS * seconds / 86_400 for tokens in STAGES.values()]
        hours = sum(days) * 24 * chips
        cells = [f"{chips}", f"{seconds:.2f}", *(f"{each:.1f} days" for each in (*days, sum(days))), f"{hours:,.0f}"]
        rows.append(f"| {generation} | {' | '.join(cells)} | ${hours * CHIPS[generation].price:,.0f} |")
    return "\n".join(rows)
