"""Conversions that end before their time: killed processes, Ctrl-C, full disks. What is there afterwards, and
what --resume makes of it."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from killed_conversion import CHUNK_BYTES
from test_convert import make_model

from aurora_jax.checkpoints.format import is_checkpoint
from convert import weight_map
from convert.__main__ import main
from convert.partial import Partial, folder_of

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(weight_map, "CHUNK_BYTES", CHUNK_BYTES)


@pytest.fixture
def hf(tmp_path) -> Path:
    make_model().save_pretrained(tmp_path / "hf", max_shard_size="9KB")
    return tmp_path / "hf"


def arguments_of(direction: str, hf: Path, tmp_path: Path) -> list[str]:
    """A conversion, but for its destination."""
    if direction == "from-torch":
        return [direction, str(hf), "--dtype", "bfloat16"]
    assert main(["from-torch", str(hf), str(tmp_path / "source")]) == 0
    return [direction, str(tmp_path / "source"), "--max-shard-size", "9KB"]


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by name, without the time and the first path of the folder that Orbax notes."""
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {
        name: content
        for name, content in files.items()
        if Path(name).name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    }


def noted(destination: Path) -> list[str]:
    """Finished blocks of an interrupted conversion."""
    lines = (folder_of(destination) / "journal").read_text().splitlines()[1:]
    return [line.split("\t")[0] for line in lines]


def recorded(monkeypatch) -> list[str]:
    """Blocks that are finished from now on."""
    blocks: list[str] = []
    finish = Partial.finish

    def finish_and_record(partial: Partial, block: str, note: str) -> None:
        blocks.append(block)
        finish(partial, block, note)

    monkeypatch.setattr(Partial, "finish", finish_and_record)
    return blocks


@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_killed_conversions_are_continued(tmp_path, hf, monkeypatch, capsys, direction):
    """Killed at random moments, again and again; in the end it is what an undisturbed conversion makes, and
    no block was made twice."""
    arguments, destination = arguments_of(direction, hf, tmp_path), tmp_path / "made"
    with monkeypatch.context() as undisturbed:
        blocks = recorded(undisturbed)
        assert main([*arguments, str(tmp_path / "expected")]) == 0
    assert len(blocks) == len({*blocks}) > 20
    rng = random.Random(0)
    moments = [["skeleton", 1]] if direction == "from-torch" else []
    moments += [["block", rng.randint(2, len(blocks) // 4)] for _ in range(3)]
    command = [
        sys.executable,
        "tests/killed_conversion.py",
        *arguments,
        str(destination),
        "--resume",
        json.dumps(moments),
    ]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert not destination.exists()
    assert not is_checkpoint(folder_of(destination) / "output")
    before = noted(destination)
    # A kill takes those along that were in flight.
    assert sum(call - 1 for place, call in moments if place == "block") >= len(before) == len({*before}) > 0

    assert main([*arguments, str(destination)]) == 2
    assert re.search(
        "made.partial holds an interrupted conversion.*--resume", " ".join(capsys.readouterr().err.split())
    )
    # A kill in the middle of a chunk leaves TensorStore's NAME.__lock, which the next write of that chunk renames.
    chunks = {file: file.stat().st_mtime_ns for file in folder_of(destination).rglob("[0-9]*.*[0-9]") if file.is_file()}
    after = recorded(monkeypatch)
    assert main([*arguments, str(destination), "--resume"]) == 0
    assert sorted(before + after) == sorted(blocks)
    assert files_of(destination) == files_of(tmp_path / "expected")
    assert is_checkpoint(destination) == (direction == "from-torch")
    assert not folder_of(destination).exists()
    if direction == "from-torch":
        untouched = [
            file for file, time in chunks.items() if destination_of(file, destination).stat().st_mtime_ns == time
        ]
        assert len(untouched) >= len(before), "a finished block is at least one chunk that nobody writes again"


def destination_of(file: Path, destination: Path) -> Path:
    return destination / file.relative_to(folder_of(destination) / "output")


@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_killed_after_the_rename_it_is_complete(tmp_path, hf, direction):
    arguments, destination = arguments_of(direction, hf, tmp_path), tmp_path / "made"
    command = [sys.executable, "tests/killed_conversion.py", *arguments, str(destination), json.dumps([["commit", 1]])]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    complete = files_of(destination)
    assert main([*arguments, str(destination)]) == 2  # it exists
    assert main([*arguments, str(destination), "--resume"]) == 0
    assert files_of(destination) == complete
    assert not folder_of(destination).exists()
    assert main([*arguments, str(destination), "--resume"]) == 2


INTERRUPTED = """
import os, signal, sys
from convert import partial, weight_map
from convert.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
weight_map.CHUNK_BYTES = {chunk_bytes}
{patched}
sys.exit(main({arguments}))
"""
AFTER_SOME_BLOCKS = """
finish, calls = partial.Partial.finish, []
def interrupted(self, block, note):
    finish(self, block, note)
    calls.append(block)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGINT)
partial.Partial.finish = interrupted
"""
BEFORE_THE_FIRST = """
def interrupted(self, *arguments):
    os.kill(os.getpid(), signal.SIGINT)
    raise SystemExit
partial.Partial.__init__ = interrupted
"""


@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
@pytest.mark.parametrize(
    "moment", [BEFORE_THE_FIRST, AFTER_SOME_BLOCKS], ids=["before the first block", "after some blocks"]
)
def test_interrupt_keeps_finished_blocks(tmp_path, hf, monkeypatch, direction, moment):
    arguments, destination = arguments_of(direction, hf, tmp_path), tmp_path / "made"
    before = sorted(tmp_path.iterdir())
    program = INTERRUPTED.format(chunk_bytes=CHUNK_BYTES, patched=moment, arguments=[*arguments, str(destination)])
    finished = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert finished.returncode == 128 + signal.SIGINT, finished.stderr
    assert "Traceback" not in finished.stderr
    if moment is BEFORE_THE_FIRST:
        assert "nothing was written" in finished.stderr
        assert sorted(tmp_path.iterdir()) == before
        return
    assert f"kept in {folder_of(destination)}: continue with --resume" in " ".join(finished.stderr.split())
    done, after = noted(destination), recorded(monkeypatch)
    assert len(done) >= 5
    assert main([*arguments, str(destination), "--resume"]) == 0
    assert not {*done} & {*after}
    assert main([*arguments, str(tmp_path / "expected")]) == 0
    assert files_of(destination) == files_of(tmp_path / "expected")


def interrupt_after(blocks: int, monkeypatch, error: BaseException) -> None:
    finish = Partial.finish

    def failing(partial: Partial, block: str, note: str) -> None:
        finish(partial, block, note)
        if len(partial.done) >= blocks:
            raise error

    monkeypatch.setattr(Partial, "finish", failing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: [], "dtype = bfloat16, this command has dtype = float32"),
        (lambda hf: ["--dtype", "bfloat16", "--vocabulary-divisible-by", "8"], "vocabulary_divisible_by = 1.*= 8"),
        (
            lambda hf: os.utime(next(hf.glob("*.safetensors"))) or ["--dtype", "bfloat16"],
            "safetensors = [0-9]+ bytes, modified at",
        ),
        (lambda hf: (hf / "merges.txt").write_text("a b\n") and ["--dtype", "bfloat16"], "config and tokenizer"),
        (lambda hf: hf.rename(hf.with_name("moved")) and ["--dtype", "bfloat16"], "source = "),
    ],
    ids=["dtype", "padding", "file", "tokenizer", "folder"],
)
def test_another_conversion_is_not_continued(tmp_path, hf, monkeypatch, capsys, change, message):
    destination = tmp_path / "made"
    with monkeypatch.context() as patched:
        interrupt_after(3, patched, OSError(28, "No space left on device"))
        assert main(["from-torch", str(hf), str(destination), "--dtype", "bfloat16"]) == 2
    done, options = noted(destination), change(hf)
    folder = next(folder for folder in (hf, hf.with_name("moved")) if folder.exists())
    capsys.readouterr()
    assert main(["from-torch", str(folder), str(destination), *options, "--resume"]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert noted(destination) == done


def test_another_process_is_not_disturbed(tmp_path, hf, monkeypatch, capsys):
    destination, statuses = tmp_path / "made", []
    finish = Partial.finish

    def second(partial: Partial, block: str, note: str) -> None:
        if not statuses:
            statuses.append(None)
            command = [sys.executable, "-m", "convert", "from-torch", str(hf), str(destination), "--resume"]
            statuses.append(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True))
        finish(partial, block, note)

    monkeypatch.setattr(Partial, "finish", second)
    assert main(["from-torch", str(hf), str(destination)]) == 0
    assert statuses[1].returncode == 2
    assert "another process is converting to it" in " ".join(statuses[1].stderr.split())
    assert is_checkpoint(destination)


def test_a_source_that_ends_half_way_leaves_nothing(tmp_path, hf, monkeypatch, capsys):
    """Truncated while it is read: its blocks are worth nothing."""
    finish = Partial.finish

    def truncate(partial: Partial, block: str, note: str) -> None:
        finish(partial, block, note)
        for file in hf.glob("*.safetensors"):
            os.truncate(file, 2000)

    monkeypatch.setattr(Partial, "finish", truncate)
    assert main(["from-torch", str(hf), str(tmp_path / "made")]) == 2
    assert re.search("safetensors ends before the tensor does", " ".join(capsys.readouterr().err.split()))
    assert os.listdir(tmp_path) == ["hf"]


@contextlib.contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"only root can mount a small disk: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("direction", ["from-torch", "to-torch"])
def test_a_full_disk_keeps_finished_blocks(tmp_path, hf, capsys, direction):
    arguments = arguments_of(direction, hf, tmp_path)
    assert main([*arguments, str(tmp_path / "expected")]) == 0
    # A file takes whole pages of 4 KiB there.
    needed = sum(-(-len(content) // 4096) * 4 for content in files_of(tmp_path / "expected").values())
    with small_disk(tmp_path / "disk", needed * 2 // 3):
        destination = tmp_path / "disk" / "made"
        capsys.readouterr()
        assert main([*arguments, str(destination)]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert re.search("disk/made cannot be written: .*No space.*continue with --resume", error), error
        done = noted(destination)
        assert done
        assert not destination.exists()
        subprocess.run(["mount", "-o", f"remount,size={needed * 2}k", str(tmp_path / "disk")], check=True)
        assert main([*arguments, str(destination), "--resume"]) == 0
        assert files_of(destination) == files_of(tmp_path / "expected")
