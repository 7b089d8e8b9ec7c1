"""The documentation builds strictly, and every command in it is read by the program that it is for."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tyro

from aurora_jax.checkpoints.commands import COMMANDS as CHECKPOINT_COMMANDS
from aurora_jax.cli import COMMANDS, DATA_COMMANDS
from aurora_jax.cli import main as aurora
from aurora_jax.plan.plan_command import PlanOptions
from convert.__main__ import main as convert

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*PAGES, *sorted((ROOT / "configs").glob("[!_]*.py"))]

OTHERS = {"git", "cd", "export", "source", "echo", "pip", "jupyter", "tensorboard", "huggingface-cli", "wandb"}
"""Programs that are not ours: their commands are not checked."""
STAND_INS = {"N": "1", "CONFIG": "configs/nano_aurora.py", "CONFIG.py": "configs/nano_aurora.py"}
"""Words that the reader replaces."""
THEIRS = re.compile(r"best\.py")
"""Configs that the reader writes."""


FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*[\w]")
THEIR_FLAGS = {
    "--json",
    "--run-maxtext",
    "--scaling",
    "--temp-location",
    "--project",
    "--region",
    "--setup-file",
    "--sdk-container-image",
    "--FIELD",
}
"""Of the benchmarks' scripts, and of Beam behind --beam-options."""


class Parsed(Exception):
    """Raised in place of running a command."""


def commands(path: Path) -> list[str]:
    """Commands of the fenced blocks without a language (of configs: their docstrings' lines), continuation
    lines joined."""
    text = re.sub(r"[ \t]*\\\n\s*", " ", path.read_text())
    if path.suffix == ".py":
        return re.findall(r"^ *((?:aurora|python -m) .*)$", text.split('"""')[1], flags=re.M)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.S | re.M)
    return [line for language, block in blocks if not language for line in block.splitlines() if line.strip()]


def checked(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has one command read by its program. Fails if it is refused."""
    words = [STAND_INS.get(word, word) for word in shlex.split(line, comments=True)]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words:
        return
    program = Path(words[0]).name
    if program == "python" and words[1] == "-m":
        program, words = words[2], words[2:]
    if program in ("aurora", "convert", "aurora_jax"):
        config = "configs/nano_aurora.py" if words[1] == "train" else "configs/starcoderplus_v5p_128.py"
        read_by(
            convert if program == "convert" else aurora, [THEIRS.sub(config, word) for word in words[1:]], monkeypatch
        )
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(words[1:]) <= set(targets), f"{line}: the Makefile has {targets}"
    elif program == "launch_tpu.sh":
        words = [THEIRS.sub("configs/starcoderplus_v5p_128.py", word) for word in words]
        ran = subprocess.run(
            ["bash", "launch_tpu.sh", words[1], "--dry-run", *words[2:]],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, f"{line}: {ran.stderr}"
        config = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
        if config is not None:
            read_by(aurora, ["train", *words[config:]], monkeypatch)
    elif program in ("python", "pytest"):
        files = [word for word in words[1:] if word.endswith(".py")]
        assert files, f"{line}: names no file"
        assert all((ROOT / file).is_file() for file in files), f"{line}: no such file"
    else:
        assert program in OTHERS, f"{line}: nothing checks {program}"


def read_by(main, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parser reads the arguments; nothing runs."""
    parse = tyro.cli

    def parse_only(*positional, **named):
        parse(*positional, **named)
        raise Parsed

    said = io.StringIO()
    with monkeypatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        patch.setattr(tyro, "cli", parse_only)
        try:
            status = main(arguments)
        except Parsed:
            return
        except SystemExit as stopped:
            status = stopped.code
    assert status == 0, f"{shlex.join(arguments)}: {said.getvalue()}"


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if commands(path)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_are_read_by_their_programs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    for line in commands(path):
        for part in re.split(r" && | \| ", line):
            checked(part, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "aurora train configs/nano_aurora.py --optimiser.beta1 0.9",
        "aurora trian configs/nano_aurora.py",
        "aurora data build nano_cap --tokeniser x",
        "python -m convert from-torch SRC",
        "make tests",
        "python benchmarks/none.py",
        "./launch_tpu.sh up --spto",
        "./launch_tpu.sh run configs/nano_aurora.py --optimiser.beta1 0.9",
        "rm -rf runs",
    ],
)
def test_a_wrong_command_would_be_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(AssertionError):
        checked(line, monkeypatch)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning of MkDocs (a page outside the navigation, a link or an anchor that is not
    there) fails the build."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_flags_named_in_the_running_text_exist(site):
    """In `code` spans. The page of the commands' own help says which there are."""
    known = set(FLAG.findall(re.sub(r"<[^>]+>", "", (site / "reference" / "commands" / "index.html").read_text())))
    known |= {"--" + field.name.replace("_", "-") for field in fields(PlanOptions)} | {"--list"}
    wrong = []
    for path in PAGES:
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.S | re.M)
        for span in re.findall(r"`([^`\n]+)`", prose):
            flags = {flag.replace("--config.", "--").replace("_", "-") for flag in FLAG.findall(span)}
            if flags - known - THEIR_FLAGS and span.split()[0] not in OTHERS:
                wrong.append((path.name, span))
    assert not wrong


def test_every_command_has_its_help_in_the_reference():
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    named = set(re.findall(r"<!-- help: (.+?) -->", page))
    expected = {f"aurora data {name}" for name in DATA_COMMANDS} | {
        f"aurora {name}" for name in COMMANDS if name not in ("data", "train", "checkpoints")
    }
    expected |= {f"aurora checkpoints {name}" for name in CHECKPOINT_COMMANDS}
    expected |= {"aurora", "aurora train configs/nano_aurora.py"} | {
        f"python -m convert{name}" for name in ("", " from-torch", " to-torch", " verify")
    }
    verbs = re.findall(r"^  ([a-z]+) {2,}", help_of_launcher(), flags=re.M)
    assert named == expected | {"launch_tpu.sh"} | {f"launch_tpu.sh {verb}" for verb in verbs}


def help_of_launcher() -> str:
    return subprocess.run(
        ["bash", "launch_tpu.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_planned_cost_is_that_of_the_recorded_step_time(site):
    """v5p, 2,048 tokens: 435B tokens in steps of 4,194,304 on 64 chips at $4.20, each in the seconds that the
    config states."""
    (seconds,) = re.findall(r"([\d.]+) s a step", (ROOT / "configs" / "starcoderplus_v5p_128_2k.py").read_text())
    hours = 435e9 / 4_194_304 * float(seconds) / 3600 * 64
    assert f"{hours:,.0f}</td>" in (site / "reproduction" / "index.html").read_text()
    assert f"${hours * 4.20:,.0f}</td>" in (site / "reproduction" / "index.html").read_text()


class Links(HTMLParser):
    """What a page loads or links to."""

    def __init__(self):
        super().__init__()
        self.links, self.loaded = [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        self.loaded += [
            values[name] for name in ("src", "href") if tag in ("img", "script", "link", "iframe") and values.get(name)
        ]


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        found = Links()
        found.feed(page.read_text())
        assert not [address for address in found.loaded if "//" in address and not address.startswith("data:")], page
        for link in found.links:
            assert re.match(r"https://[\w.-]+\.[a-z]{2,}(/|$)|[^:]*$", link), f"{page}: {link}"
            target = link.partition("#")[0]
            if "://" not in link and target and page.name != "404.html":
                resolved = (page.parent / target).resolve()
                assert resolved.is_file() or (resolved / "index.html").is_file(), f"{page}: {link}"


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_of_the_pages_outside_the_site_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_row_of_the_table_of_faults_is_a_test():
    """What docs/reliability.md promises is proved by the test that it names."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"^\|.*\| `(test_\w+)` \|$", page, flags=re.M)
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) == len(rows) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
