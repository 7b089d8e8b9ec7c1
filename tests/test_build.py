"""The build: whatever interrupts it and however many work on it, the same bytes."""

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from bucket import bucket_in
from conftest import SENTENCES
from rich.console import Console

from aurora_jax.cli import main
from aurora_jax.data.batches import store
from aurora_jax.data.batches.store import TokenStore, read_info
from aurora_jax.data.build import pipeline as build
from aurora_jax.data.build.build_command import summary
from aurora_jax.data.build.pipeline import jobs_for, pipeline
from aurora_jax.data.build.stores import build_stores
from aurora_jax.data.text import readers
from aurora_jax.data.text.documents import CodeFormat, Document, DocumentStep, FillInTheMiddle, Piece, Rejected
from aurora_jax.data.text.recipe import Dropped, Preparation, Recipe
from aurora_jax.data.text.sources import Source
from aurora_jax.data.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from aurora_jax.errors import InputError

HERE = Path(__file__).parent
KILLS = 10


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of 60 documents in all languages, with two bad lines among them."""
    folder = tmp_path_factory.mktemp("source")
    rng = random.Random(0)
    for number in range(4):
        lines = [
            json.dumps({"text": " ".join(rng.choices(list(SENTENCES.values()), k=rng.randint(1, 4)))})
            for _ in range(60)
        ]
        if number in (1, 3):
            lines[17] = "not json"
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file; empty folders do not count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(source: Path, tokenizer: Path, output: Path, workers: int = 1) -> subprocess.Popen:
    """The build in a process group of its own, past its imports."""
    words = [
        sys.executable,
        str(HERE / "build_small_store.py"),
        f"{source}/*.jsonl",
        str(tokenizer),
        str(output),
        str(workers),
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=HERE.parent)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_killed_builds_go_on_to_the_same_bytes(source: Path, mini_tokenizer: Path, tmp_path: Path) -> None:
    """SIGKILL at ten random moments, each rerun going on with what the one before has left."""
    begun = time.monotonic()
    assert start(source, mini_tokenizer, tmp_path / "undisturbed").wait() == 0
    # Counted from the start of the process: a moment within the imports is as good as another.
    seconds = time.monotonic() - begun
    output, rng, midway = tmp_path / "killed", random.Random(7), 0
    for _ in range(KILLS):
        process = start(source, mini_tokenizer, output)
        # Later moments have less left to interrupt: where the store is complete, it is taken away, and the
        # building begins again.
        time.sleep(rng.uniform(0, seconds / 2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        midway += (output / "small/train/parts").exists()
        if (output / "small/train/store.json").exists():
            shutil.rmtree(output)
    assert midway, "no kill came in the middle of the work"
    assert start(source, mini_tokenizer, output).wait() == 0
    assert contents(output) == contents(tmp_path / "undisturbed")


def small_recipe(source: Path | str, tokenizer: Path, *steps: DocumentStep) -> Recipe:
    return Recipe(
        "small",
        "train",
        Source({"train": (f"{source}/*.jsonl",)}, "jsonl"),
        steps,
        HuggingFaceTokenizer(tokenizer),
        True,
    )


def documents(store: TokenStore) -> list[list[int]]:
    return [store.document(index).tolist() for index in range(store.info.documents)]


def test_sizes_of_parts_and_shards_do_not_matter(
    source: Path, mini_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(source, mini_tokenizer)
    (whole,) = build_stores([recipe], tmp_path / "whole", max_bad_fraction=0.1).values()
    for module, name, value in (
        (readers, "PART_BYTES", 997),
        (build, "CHUNK_TOKENS", 101),
        (store, "SHARD_ELEMENTS", 96),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(store, "CHUNK_ELEMENTS", 8)
    (cut,) = build_stores([recipe], tmp_path / "cut", max_bad_fraction=0.1).values()
    assert len(list((tmp_path / "cut/small/train/tokens").rglob("*"))) > 50
    assert documents(cut) == documents(whole)
    assert (cut.window_ends(np.array([0]), len(cut)) == whole.window_ends(np.array([0]), len(whole))).all()
    texts = [
        json.loads(line)["text"]
        for path in sorted(source.iterdir())
        for line in path.read_text().splitlines()
        if line != "not json"
    ]
    assert [recipe.tokenizer.decode(ids[:-1]) for ids in documents(cut)] == texts


def test_the_number_of_workers_does_not_matter(source: Path, mini_tokenizer: Path, tmp_path: Path) -> None:
    recipe = small_recipe(source, mini_tokenizer)
    for workers in (1, 2):
        build_stores([recipe], tmp_path / str(workers), workers=workers, max_bad_fraction=0.1)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_the_pipeline_translates_for_dataflow(source: Path, mini_tokenizer: Path, tmp_path: Path) -> None:
    """Every function and coder of it survives the form in which Dataflow's service gets a pipeline."""
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner

    jobs, _, _ = jobs_for([small_recipe(source, mini_tokenizer)], tmp_path, max_bad_fraction=0.1)
    options = PipelineOptions(
        ["--project=a-project", "--region=us-central1", "--temp_location=gs://bucket/t", "--no_auth"]
    )
    root = beam.Pipeline(options=options)
    pipeline(root, jobs)
    proto = root.to_runner_api(default_environment=beam.transforms.environments.DockerEnvironment("image"))
    with bucket_in(tmp_path / "objects"):  # whose policy it looks at
        again = beam.Pipeline.from_runner_api(proto, DataflowRunner(), options)
    names = {transform.full_label for transform in again.transforms_stack[0].parts}
    assert {"tokenize", "plan shards", "write shards", "complete"} <= names


@dataclass(frozen=True)
class Choosy(DocumentStep):
    """Rejects Japanese, stumbles over Hindi."""

    def __call__(self, document: Document) -> Document:
        if "すべて" in document.text:
            raise Rejected("is Japanese")
        if "सभी" in document.text:
            raise ValueError("Hindi")
        return document


def test_a_step_that_fails_is_counted_and_named(source: Path, mini_tokenizer: Path, tmp_path: Path) -> None:
    recipe = small_recipe(source, mini_tokenizer, Choosy())
    texts = [
        json.loads(line)["text"]
        for path in sorted(source.iterdir())
        for line in path.read_text().splitlines()
        if line != "not json"
    ]
    japanese = [text for text in texts if "すべて" in text]
    hindi = [text for text in texts if "すべて" not in text and "सभी" in text]
    message = rf"small/train: {len(hindi) + 2} of 240 records are bad \(Choosy: ValueError: Hindi \({len(hindi)}\)"
    with pytest.raises(InputError, match=message):
        build_stores([recipe], tmp_path, max_bad_fraction=0.01)
    (built,) = build_stores([recipe], tmp_path, max_bad_fraction=0.9).values()
    assert built.info.documents == len(texts) - len(japanese) - len(hindi)
    report = json.loads((tmp_path / "small/train/report.json").read_text())
    assert report["dropped"] == {"Choosy: is Japanese\tund": len(japanese)}
    assert report["bad"] == {"Choosy: ValueError: Hindi": len(hindi), "not JSON": 2}


def test_one_unreadable_file_does_not_lose_the_others(source: Path, mini_tokenizer: Path, tmp_path: Path) -> None:
    """A truncated archive is named; the other store is built; the rerun mends only what was wrong."""
    import gzip

    (tmp_path / "broken").mkdir()
    archive = tmp_path / "broken/a.jsonl.gz"
    whole = gzip.compress(
        b"".join(b'{"text": "%d"}\n' % number for number in random.Random(0).sample(range(10**9), 5000))
    )
    archive.write_bytes(whole[: len(whole) // 2])
    tokenizer = HuggingFaceTokenizer(mini_tokenizer)
    broken = Recipe("broken", "train", Source({"train": (str(archive),)}, "jsonl"), (), tokenizer, True)
    sound = small_recipe(source, mini_tokenizer)
    with pytest.raises(
        InputError, match=rf"broken/train: 1 of 1 parts cannot be read; the first: {re.escape(str(archive))}: truncated"
    ):
        build_stores([broken, sound], tmp_path / "stores", max_bad_fraction=0.1)
    assert read_info(tmp_path / "stores/broken/train") is None
    made = (tmp_path / "stores/small/train/store.json").stat().st_mtime_ns
    archive.write_bytes(whole)
    built = build_stores([broken, sound], tmp_path / "stores", max_bad_fraction=0.1)
    assert built["broken/train"].info.documents == 5000
    assert (tmp_path / "stores/small/train/store.json").stat().st_mtime_ns == made


def test_a_full_disk_is_named_and_loses_nothing(source: Path, mini_tokenizer: Path, tmp_path: Path) -> None:
    """Files may not grow beyond a kilobyte here, as if the disk were full; with room, the same command ends
    what it began."""
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = sys.argv[1:];"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY)); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [
        str(HERE / "build_small_store.py"),
        f"{source}/*.jsonl",
        str(mini_tokenizer),
        str(tmp_path / "stores"),
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    assert re.search(r"InputError: .*cannot be written: File too large; what is done is kept", done.stderr), (
        done.stderr[-2000:]
    )
    assert read_info(tmp_path / "stores/small/train") is None
    subprocess.run([sys.executable, *words], cwd=HERE.parent, check=True)
    assert read_info(tmp_path / "stores/small/train") is not None


def test_the_command(mini_corpus: Path, mini_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two splits of a mixture; a second run leaves them alone; another tokenizer is refused; all in words."""
    arguments = [
        "data",
        "build",
        "nano_cap",
        "--tokenizer",
        str(mini_tokenizer),
        "--data-root",
        str(mini_corpus),
        "--workers",
        "1",
    ]
    arguments += ["--output", str(tmp_path / "stores"), "--splits", "train", "validation"]
    assert main(arguments) == 0
    assert re.search(r"sample_fi *│ validation *│ fi *│ +4 │", capsys.readouterr().out)
    before = contents(tmp_path)
    assert main(arguments) == 0
    assert contents(tmp_path) == before
    assert main([*arguments[:2], "nano_cup", *arguments[3:]]) == 2
    assert "nano_cup" in capsys.readouterr().err


WHITE = ["", " \n\t\r", "\u3000\x85"]
"""Texts of nothing, and of white space as Unicode has it."""


def test_texts_without_a_text_are_dropped_and_counted(tmp_path: Path) -> None:
    """In every format, also where a step would put a header before them; the numbers are in the report and in
    the table."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    kept = ["a", " b ", "<|endoftext|>"]
    records = [{"text": text, "path": "p.py"} for text in [*WHITE, *kept]]
    for format in ("jsonl", "json", "parquet", "arrow", "lines", "text"):
        (tmp_path / format).mkdir()
    (tmp_path / "jsonl" / "a").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "json" / "a").write_text(json.dumps(records))
    table = pa.Table.from_pylist(records)
    parquet.write_table(table, tmp_path / "parquet" / "a")
    with ipc.new_stream(str(tmp_path / "arrow" / "a"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "lines" / "a").write_text("\n \t\r\n\u3000\x85\n" + "\n".join(kept) + "\n", newline="")
    for number, text in enumerate([*WHITE, *kept]):
        (tmp_path / "text" / str(number)).write_text(text, newline="")
    tokenizer = ByteTokenizer()
    recipes = [
        Recipe(
            folder.name,
            "train",
            Source({"train": (f"{folder}/*",)}, folder.name, fields={"path": "path"}),
            (),
            tokenizer,
            True,
        )  # type: ignore[arg-type]
        for folder in sorted(tmp_path.iterdir())
    ]
    recipes.append(
        Recipe("code", "train", recipes[2].reader, (CodeFormat(rate=1), FillInTheMiddle(rate=0)), StarcoderLike(), True)
    )
    stores = build_stores(recipes, tmp_path / "stores")
    for name, made in stores.items():
        report = json.loads((tmp_path / "stores" / name / "report.json").read_text())
        assert (made.info.documents, report["dropped"], report["bad"]) == (3, {"empty\tund": 3}, {}), name
        if name != "code/train":
            assert [tokenizer.decode(ids) for ids in documents(made)] == kept
    printed = io.StringIO()
    Console(width=160, file=printed).print(summary(stores))
    assert re.search(
        r"jsonl\W+train\W+und\W+3\W+\d+\W+[\d.]+\W+3\W+0\W", printed.getvalue()
    )  # documents, tokens, bytes/token, dropped, bad


class StarcoderLike(ByteTokenizer):
    """Bytes that know StarCoder's special tokens."""

    def special_id(self, name: str) -> int:
        return self.eos_id


def test_a_text_that_the_tokenizer_makes_nothing_of_is_dropped() -> None:
    class Deaf(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
            return [np.zeros(0, np.int32) for _ in texts]

    assert list(Preparation((), Deaf(), append_eos=True).outcomes([Document((Piece("\u200b"),))])) == [
        Dropped("empty", "und")
    ]


def test_stores_of_the_format_before_are_opened_and_told_apart(tmp_path: Path) -> None:
    """By the fingerprint that this recipe had in the code of 2026-11-24. One that is built now has another."""
    (tmp_path / "a.txt").write_text("a\n\nb\n")
    recipe = Recipe("t", "train", Source({"train": (f"{tmp_path}/a.txt",)}, "lines"), (), ByteTokenizer(), True)
    (made,) = build_stores([recipe], tmp_path / "stores").values()
    place = tmp_path / "stores" / "t" / "train" / "store.json"
    info = json.loads(place.read_text())
    before = "a85ba2413e609f81653a6a90ca9563bf6ac6b1d860f7d4afe73db810fdd893de"
    assert info["fingerprint"] == made.info.fingerprint == recipe.fingerprint != before
    del info["format"], info["sha256"]
    place.write_text(json.dumps(info | {"fingerprint": before}))
    printed = io.StringIO()
    (opened,) = build_stores([recipe], tmp_path / "stores", console=Console(file=printed, width=300)).values()
    assert opened.info.fingerprint == before
    assert "of an earlier format, in which documents without a text stay: t/train" in printed.getvalue()
    place.write_text(json.dumps(info | {"fingerprint": "f" * 64}))
    with pytest.raises(InputError, match=f"{'f' * 16}, expected is {recipe.fingerprint[:16]}"):
        build_stores([recipe], tmp_path / "stores")
