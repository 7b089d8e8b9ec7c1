"""The data road against its peers: building, loading, seeking, memory. Two cores, no accelerator.

    python benchmarks/data.py [--corpus DIR] [--rounds 3] [--json FILE]

    build    `aurora data build` of the sample corpus (several times over), tokenizer and files as in use, against
             the `tokenizers` library encoding the same texts in batches on all cores: seconds of both from the
             first text to the last token, workers started
    load     batches of 32 x 256 tokens out of the stores, against `seqio.get_dataset` that tokenizes and packs on
             the way
    share    a batch, as the train loop gets it, against a step of configs/nano_aurora.py
    seek     opening the stores and making the batch of step 1,000,000
    memory   peak of a process that reads 300 batches at random places of a store of 20 million tokens, and of one
             of 400 million

Each measurement is a process of its own, the two sides take turns, and the median counts.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from aurora_jax.languages import LANGUAGES  # noqa: E402

COPIES = 4
"""Of the sample corpus, each with other words in front: a hundred megabytes."""
BATCH, LENGTH = 32, 256
STORE_TOKENS = (20_000_000, 400_000_000)


@dataclass(frozen=True)
class Benchmark:
    corpus: Path = Path("quickstart/corpus")
    """A sample corpus (`aurora data sample`, or what `make quickstart` left)."""
    tokenizer: Path = ROOT / "examples" / "nano"
    """tokenizer.json or its folder."""
    rounds: int = 3
    json: Path | None = None
    """Write the figures to this file."""


# ---------------------------------------------------------------- Measurements, each in a process of its own


def texts_of(path: Path) -> Iterator[str]:
    from aurora_jax.storage import json_lines

    for record in json_lines.read(path):
        yield record["text"]


def build_ours(folder: str, tokenizer: str, work: str) -> float:
    from aurora_jax.data.build.stores import build_stores
    from aurora_jax.data.text.recipe import Recipe
    from aurora_jax.data.text.sources import Source
    from aurora_jax.data.text.tokenizer import tokenizer_from

    recipe = Recipe(
        "all", "train", Source({"train": (f"{folder}/*.jsonl",)}, "jsonl"), (), tokenizer_from(tokenizer), True
    )
    with tempfile.TemporaryDirectory(dir=work) as output:
        begun = time.perf_counter()
        build_stores([recipe], output, workers=2)
        return time.perf_counter() - begun


def build_peer(folder: str, tokenizer: str, work: str) -> float:
    """The library as its users call it: all texts in memory, batches of 1,000, every core."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(tokenizer if tokenizer.endswith(".json") else f"{tokenizer}/tokenizer.json")
    documents = [text for path in sorted(Path(folder).glob("*.jsonl")) for text in texts_of(path)]
    begun = time.perf_counter()
    for first in range(0, len(documents), 1_000):
        library.encode_batch(documents[first : first + 1_000])
    return time.perf_counter() - begun


def load_ours(corpus: str, tokenizer: str, work: str) -> float:
    """Tokens a second."""
    loader = open_loader(corpus, tokenizer, work)
    steps = 600
    for _ in loader.prefetched(0, 20):
        pass
    begun = time.perf_counter()
    for _ in loader.prefetched(20, 20 + steps):
        pass
    return steps * BATCH * LENGTH / (time.perf_counter() - begun)


def load_peer(corpus: str, tokenizer: str, work: str) -> float:
    """Tokens a second of SeqIO with its own preprocessors, mixture and packing; texts as tf.train.Examples in
    TFRecords."""
    import seqio
    import tensorflow as tf

    from aurora_jax.data.corpora.sample_tasks import MIXTURES
    from aurora_jax.data.registry.vocabulary import vocabulary_from

    vocabulary = vocabulary_from(tokenizer)
    for language in LANGUAGES:
        path = f"{work}/{language}.tfrecord"
        with tf.io.TFRecordWriter(path) as writer:
            for text in texts_of(Path(corpus, "train", f"{language}.jsonl")):
                value = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
                writer.write(
                    tf.train.Example(features=tf.train.Features(feature={"targets": value})).SerializeToString()
                )
        seqio.TaskRegistry.add(
            f"sample_{language}",
            source=seqio.TFExampleDataSource({"train": path}, {"targets": tf.io.FixedLenFeature([], tf.string)}),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={"targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)},
        )
    seqio.MixtureRegistry.add("nano_cap", list(MIXTURES["nano_cap"].items()))
    dataset = seqio.get_dataset(
        "nano_cap",
        {"targets": LENGTH},
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        seed=0,
        feature_converter=seqio.LMFeatureConverter(pack=True),
    )
    batches = iter(dataset.batch(BATCH).prefetch(2).as_numpy_iterator())
    next(batches)
    count, begun = 40, time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH * LENGTH / (time.perf_counter() - begun)


def batch_seconds(corpus: str, tokenizer: str, work: str) -> float:
    """Seconds of the processor for a batch, when nothing is prefetched."""
    loader = open_loader(corpus, tokenizer, work)
    for step in range(20):
        loader.batch(step)
    begun = time.process_time()
    for step in range(20, 320):
        loader.batch(step)
    return (time.process_time() - begun) / 300


def step_seconds(corpus: str, tokenizer: str, work: str) -> float:
    """Seconds of a training step of configs/nano_aurora.py."""
    command = [sys.executable, str(ROOT / "benchmarks" / "train_cpu.py"), "--measure", "ours", "bfloat16"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()[-1])


def seek(corpus: str, tokenizer: str, work: str) -> float:
    """Seconds from closed stores to the batch of step 1,000,000; imports do not count."""
    open_loader(corpus, tokenizer, work)
    from aurora_jax.data.batches.loader import DataStage, Loader
    from aurora_jax.data.batches.store import TokenStore

    begun = time.perf_counter()
    stores = {language: TokenStore.open(f"{work}/stores/{language}/train") for language in LANGUAGES}
    stage = DataStage("cap", tuple((language, 1.0) for language in LANGUAGES), 2_000_000)
    Loader(stores, [stage], batch_size=BATCH, sequence_length=LENGTH, seed=0).batch(1_000_000)
    return time.perf_counter() - begun


def memory(corpus: str, tokenizer: str, work: str, tokens: str) -> float:
    """Bytes of the process's peak."""
    from aurora_jax.data.batches.loader import DataStage, Loader
    from aurora_jax.data.batches.store import TokenStore

    stores = {"random": TokenStore.open(f"{work}/random-{tokens}")}
    loader = Loader(
        stores, [DataStage("one", (("random", 1.0),), 300)], batch_size=BATCH, sequence_length=2_048, seed=0
    )
    for _ in loader.prefetched(0, 300):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_loader(corpus: str, tokenizer: str, work: str):
    """The sample corpus's stores (built once) in equal shares."""
    from aurora_jax.data.batches.loader import DataStage, Loader
    from aurora_jax.data.build.stores import build_stores
    from aurora_jax.data.text.recipe import Recipe
    from aurora_jax.data.text.sources import Source
    from aurora_jax.data.text.tokenizer import tokenizer_from

    made = tokenizer_from(tokenizer)
    recipes = [
        Recipe(language, "train", Source({"train": (f"{corpus}/train/{language}.jsonl",)}, "jsonl"), (), made, True)
        for language in LANGUAGES
    ]
    stores = {name.split("/")[0]: store for name, store in build_stores(recipes, f"{work}/stores").items()}
    stage = DataStage("cap", tuple((language, 1.0) for language in LANGUAGES), 2_000)
    return Loader(stores, [stage], batch_size=BATCH, sequence_length=LENGTH, seed=0)


def write_random_store(directory: str, tokens: int) -> None:
    """A store of random tokens in documents of 1,000."""
    import numpy as np

    from aurora_jax.data.batches import store

    rng = np.random.default_rng(0)
    store.create_arrays(directory, 49_152, tokens, tokens // 1_000, masked=False)
    for start in range(0, tokens, store.SHARD_ELEMENTS):
        count = min(store.SHARD_ELEMENTS, tokens - start)
        store.write_range(directory, "tokens", start, rng.integers(49_152, size=count).astype(np.uint16))
        store.write_range(directory, "ends", start, (np.arange(start, start + count) % 1_000) == 999)
    store.write_range(directory, "offsets", 0, np.arange(0, tokens + 1, 1_000, dtype=np.uint64))
    store.finish(
        directory, store.StoreInfo("random", "train", "", "", "", 49_152, 0, "und", tokens // 1_000, tokens, tokens)
    )


MEASUREMENTS = {
    function.__name__: function
    for function in (build_ours, build_peer, load_ours, load_peer, batch_seconds, step_seconds, seek, memory)
}


# ---------------------------------------------------------------- The benchmark


def main(benchmark: Benchmark) -> None:
    """Measures, prints and writes."""
    from aurora_jax.errors import InputError
    from aurora_jax.storage import json_lines

    if not (benchmark.corpus / "train" / "en.jsonl").is_file():
        raise InputError(
            f"{benchmark.corpus}: no sample corpus; make it with `aurora data sample {benchmark.corpus}`, or "
            "give --corpus"
        )
    console = Console()
    figures: list[dict] = []
    with tempfile.TemporaryDirectory() as work:
        copies = Path(work, "texts")
        copies.mkdir()
        for copy in range(COPIES):
            for language in LANGUAGES:
                with (copies / f"{language}-{copy}.jsonl").open("wb") as file:
                    for text in texts_of(benchmark.corpus / "train" / f"{language}.jsonl"):
                        file.write(json_lines.line_of({"text": f"{copy} {text}"}))
        megabytes = sum(path.stat().st_size for path in copies.iterdir()) / 1e6

        def measure(name: str, corpus: Path | str, *more: str) -> float:
            command = [sys.executable, __file__, "--measure", name, str(corpus), str(benchmark.tokenizer), work, *more]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            return float(done.stdout.split()[-1])

        def both(ours: str, peer: str, corpus: Path) -> tuple[float, float]:
            found: dict[str, list[float]] = {ours: [], peer: []}
            for _ in range(benchmark.rounds):
                for name in (ours, peer):
                    found[name].append(measure(name, corpus))
            return statistics.median(found[ours]), statistics.median(found[peer])

        def figure(name: str, ours: float, peer: float, unit: str, target: float, met: bool) -> None:
            figures.append(
                {
                    "name": name,
                    "ours": ours,
                    "peer": peer,
                    "unit": unit,
                    "ratio": ours / peer,
                    "target": target,
                    "met": met,
                }
            )
            console.print(f"{name}: {ours:.4g} against {peer:.4g} {unit}", highlight=False)

        with console.status("building"):
            ours, peer = both("build_ours", "build_peer", copies)
        rates = (megabytes / ours, megabytes / peer)
        figure("build, against batch encoding by tokenizers", *rates, "MB/s", 0.8, rates[0] >= 0.8 * rates[1])
        with console.status("loading"):
            ours, peer = both("load_ours", "load_peer", benchmark.corpus)
        figure("load, against seqio.get_dataset with packing", ours, peer, "tokens/s", 20, ours >= 20 * peer)
        with console.status("a training step"):
            ours, peer = both("batch_seconds", "step_seconds", benchmark.corpus)
        figure("a batch, against a nano training step", ours, peer, "s", 0.03, ours <= 0.03 * peer)
        with console.status("seeking"):
            ours = statistics.median(measure("seek", benchmark.corpus) for _ in range(benchmark.rounds))
        figure("first batch at step 1,000,000", ours, 1.0, "s", 1.0, ours <= 1.0)
        with console.status("memory"):
            for tokens in STORE_TOKENS:
                write_random_store(f"{work}/random-{tokens}", tokens)
            runs = {
                tokens: [measure("memory", benchmark.corpus, str(tokens)) for _ in range(benchmark.rounds)]
                for tokens in STORE_TOKENS
            }
            small, large = map(statistics.median, runs.values())
        figure("memory with 20 times the store", large / 1e6, small / 1e6, "MB", 1.1, large <= 1.1 * small)

    table = Table(
        "what",
        "ours",
        "peer",
        "unit",
        "ratio",
        "target",
        "met",
        title=f"the data road, {megabytes:.0f} MB of text to build",
    )
    for each in figures:
        table.add_row(
            each["name"],
            f"{each['ours']:,.4g}",
            f"{each['peer']:,.4g}",
            each["unit"],
            f"{each['ratio']:.3g}x",
            f"{each['target']}x",
            "yes" if each["met"] else "no",
        )
    console.print(table)
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(MEASUREMENTS[sys.argv[2]](*sys.argv[3:]))
    else:
        main(tyro.cli(Benchmark, description=__doc__))
