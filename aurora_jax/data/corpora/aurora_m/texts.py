"""Web, encyclopedia, code and domains: the rows of raw text and of code."""

from aurora_jax.data.corpora.aurora_m.entry import BOTH, CAP, Entry
from aurora_jax.data.text.documents import CodeFormat, FillInTheMiddle, Instruction
from aurora_jax.data.text.reshaping import Compose

# Aurora-M's own use of fill-in-the-middle is not known; StarCoder's is the default (memory), and it needs
# StarCoder's special tokens.
CODE = (CodeFormat(), FillInTheMiddle())
STACK_FIELDS = {"repository": "max_stars_repo_name", "path": "max_stars_repo_path", "stars": "max_stars_count"}
STACK_LICENSE = "permissive, file by file (field max_stars_repo_licenses); the Stack's terms of use"
# StarCoder's languages (memory), as folders of the Stack; Python and markdown are entries of their own.
CODE_FOLDERS = """
    ada agda alloy antlr applescript assembly augeas awk batchfile bluespec c c++ c-sharp clojure cmake
    coffeescript common-lisp css cuda dart dockerfile elixir elm emacs-lisp erlang f-sharp fortran glsl go
    groovy haskell html idris isabelle java java-server-pages javascript julia kotlin lean literate-agda
    literate-coffeescript literate-haskell lua makefile maple mathematica matlab ocaml pascal perl php
    powershell prolog protocol-buffer r racket restructuredtext rmarkdown ruby rust sas scala scheme shell
    smalltalk solidity sparql sql stan standard-ml stata systemverilog tcl tcsh tex thrift typescript verilog
    vhdl visual-basic xslt yacc zig
"""


def _stack(name: str, folders: list[str], billions: float, note: str = "") -> Entry:
    return Entry(
        name, "bigcode/the-stack-dedup", tuple(f"data/{folder}/*.parquet" for folder in folders), "parquet",
        "code", "code", BOTH, STACK_LICENSE, billions, text="content", fields=STACK_FIELDS, steps=CODE, note=note,
    )  # fmt: skip


def _web(language: str, billions: float) -> Entry:
    return Entry(
        f"web_{language}", "uonlp/CulturaX", (f"{language}/{language}_part_*.parquet",), "parquet", language,
        "web", BOTH, "ODC-By (mC4), CC0 (OSCAR)", billions,
        note="stands for Aurora-M's own crawl, which was cleaned by methods similar to CulturaX's",
    )  # fmt: skip


def _redpajama(name: str, pattern: str, billions: float, note: str = "") -> Entry:
    return Entry(
        f"redpajama_{name}", "togethercomputer/RedPajama-Data-1T", (pattern,), "jsonl", "en", "web", BOTH,
        "of its sources (Common Crawl's terms, ODC-By, arXiv, CC-BY-SA)", billions,
        note=f"files of data.together.xyz/redpajama-data-1T/v1.0.0; the hub holds their addresses{note}",
    )  # fmt: skip


def _wikipedia(language: str, billions: float) -> Entry:
    return Entry(
        f"wikipedia_{language}", "wikimedia/wikipedia", (f"20231101.{language}/train-*.parquet",), "parquet",
        language, "encyclopedia", BOTH, "CC-BY-SA-3.0, GFDL", billions, fields={"title": "title"},
        steps=(Compose("{title}\n\n{text}"),), note="Aurora-M's dump is not known",
    )  # fmt: skip


def _domain(name: str, what: str, billions: float) -> Entry:
    return Entry(
        name, f"mdel/{name}", ("*.jsonl*",), "jsonl", "en", "domain", BOTH, "of what is put there", billions,
        note=f"the card names the domain, not the data set: {what}, as JSON lines with a field text",
    )  # fmt: skip


# fmt: off
TEXTS: tuple[Entry, ...] = (
    # ---------------------------------------------------------------- Web
    Entry(
        "refinedweb", "tiiuae/falcon-refinedweb", ("data/train-*.parquet",), "parquet", "en", "web", BOTH,
        "ODC-By-1.0", 600, text="content",
    ),
    _redpajama("common_crawl", "common_crawl/*/*.jsonl.zst", 880),
    _redpajama("c4", "c4/c4-train.*.jsonl", 175),
    _redpajama("arxiv", "arxiv/*.jsonl", 28),
    _redpajama(
        "stackexchange", "stackexchange/*.jsonl", 20,
        "; its books, GitHub and Wikipedia are withdrawn or covered by other entries",
    ),
    Entry(
        "pile", "monology/pile-uncopyrighted", ("train/*.jsonl.zst",), "jsonl", "en", "web", BOTH, "of its parts",
        250, fields={"part": "meta.pile_set_name"}, validation=("val.jsonl.zst",),
        note="the Pile itself is offline; this copy lacks its copyrighted parts (memory)",
    ),
    Entry(
        "minipile", "JeanKaddour/minipile", ("data/train-*.parquet",), "parquet", "en", "web", BOTH,
        "of the Pile's parts", 1.5, validation=("data/validation-*.parquet",),
    ),
    _web("fi", 35),
    _web("hi", 60),
    _web("ja", 110),
    _web("vi", 100),
    # ---------------------------------------------------------------- Encyclopedia
    _wikipedia("en", 4.5),
    _wikipedia("fi", 0.35),
    _wikipedia("hi", 0.27),
    _wikipedia("ja", 1.0),
    _wikipedia("vi", 0.6),
    # ---------------------------------------------------------------- Code
    _stack("stack_python", ["python"], 18),
    _stack("stack_markdown", ["markdown"], 20),
    _stack(
        "stack_other", CODE_FOLDERS.split(), 190,
        "StarCoder's languages but those two (memory); Aurora-M's list is not known",
    ),
    # ---------------------------------------------------------------- Domains
    Entry(
        "smiles", "maykcaldas/smiles-transformers", ("data/train-*.parquet",), "parquet", "en", "domain", CAP,
        "MIT (memory)", 3, validation=("data/validation-*.parquet",),
        note="chemistry; nothing but symbols, so for the first stage only (ours)",
    ),
    Entry(
        "wikimusictext", "sander-wood/wikimusictext", ("wikimusictext.jsonl",), "jsonl", "en", "domain", CAP,
        "MIT (memory)", 0.0005, text="music",
        fields={"title": "title", "artist": "artist", "genre": "genre", "description": "description"},
        steps=(Compose("{title} ({artist}; {genre})\n{description}\n\n{text}"),),
        note="ABC notation; nothing but symbols, so for the first stage only; how text and music are put "
        "together is ours",
    ),
    Entry(
        "scidcc", "tanmaylaud/scidcc-instructions", ("default/train/*.parquet",), "parquet", "en", "domain", BOTH,
        "not stated (memory)", 0.01, text=None,
        fields={"instruction": "instruction", "context": "input", "response": "output"},
        steps=(Instruction(context="context"),),
        note="climate; the hub's Parquet conversion (refs/convert/parquet); fields (memory)",
    ),
    Entry(
        "tiny_bridgedict", "nampdn-ai/tiny-bridgedict", ("default/train/*.parquet",), "parquet", "mul", "domain",
        BOTH, "not stated (memory)", 0.05,
        note="dictionary of English, Vietnamese and Chinese; gated; the hub's Parquet conversion "
        "(refs/convert/parquet); field (memory)",
    ),
    _domain("finance", "reports of companies, for instance", 1),
    _domain("legal_contracts", "the contracts of pile-of-law, for instance", 5),
    _domain("political_debate", "minutes of parliaments, for instance", 1),
)
# fmt: on
