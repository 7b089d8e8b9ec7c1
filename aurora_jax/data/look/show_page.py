"""The page of `aurora data show`: one HTML file that needs nothing else."""

from collections.abc import Sequence
from html import escape
from typing import Protocol
from unicodedata import category

COLOURS = ("#0072B2", "#A05A00", "#00724F", "#A03A78", "#555555", "#B23A00")

STYLE = """
body { font: 15px/1.7 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.15rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; font-size: .9rem; }
dt { color: #666; } dd { margin: 0; }
pre { font: 14px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { border-top: 1px solid #ddd; padding-top: 1rem; }
pre span:hover { background: #ffef9f; }
.silent { opacity: .55; text-decoration: underline dotted; }
.special { color: #fff !important; border-radius: 3px; padding: 0 .25em; font-size: .85em; }
.legend span { margin-right: 1.2rem; }
"""


class Shown(Protocol):
    """A run of tokens; see `show.Run`."""

    @property
    def text(self) -> str: ...
    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def position(self) -> int: ...
    @property
    def document(self) -> int: ...
    @property
    def loss(self) -> bool: ...
    @property
    def special(self) -> bool: ...


def page(title: str, facts: Sequence[tuple[str, str]], runs: Sequence[Shown]) -> str:
    """The whole page: facts, a legend, and the tokens, each with its position and ids where the pointer rests on it."""
    rules = "".join(
        f".d{number} {{ color: {colour}; }} .special.d{number} {{ background: {colour}; }}\n"
        for number, colour in enumerate(COLOURS)
    )
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    legend = "".join(
        f'<span class="d{number}">document {number}</span>'
        for number in range(min(len(COLOURS), 1 + max(run.document for run in runs)))
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{STYLE}{rules}</style>
<h1>{escape(title)}</h1>
<dl>{listed}</dl>
<p class="legend">{legend}<span class="silent">no loss</span><span class="special d4">special token</span></p>
<pre>{"".join(map(_span, runs))}</pre>
</html>
"""


def _span(run: Shown) -> str:
    classes = [
        f"d{run.document % len(COLOURS)}",
        *([] if run.loss else ["silent"]),
        *(["special"] if run.special else []),
    ]
    ids = " ".join(map(str, run.ids))
    tip = f"position {run.position}, document {run.document}, id {ids}" + ("" if run.loss else ", no loss")
    return f'<span class="{" ".join(classes)}" title="{tip}">{escape(harmless(run.text))}</span>'


def harmless(text: str) -> str:
    """Control characters as pictures of themselves, so that no text steers a terminal or is lost in a page;
    line ends and tabs stay."""
    return "".join(
        _picture(character) if category(character) == "Cc" and character not in "\n\t" else character
        for character in text
    )


def _picture(control: str) -> str:
    return chr(0x2400 + ord(control)) if ord(control) < 32 else "\u2421"
