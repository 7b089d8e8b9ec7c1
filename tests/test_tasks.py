"""SeqIO tasks and the stores built from them, held against SeqIO's own view of the same tasks."""

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tokenizers

from aurora_jax.data.batches.store import TokenStore, read_info
from aurora_jax.data.build.opening import open_stores
from aurora_jax.data.build.stores import build_stores
from aurora_jax.data.corpora.sample_tasks import MIXTURES
from aurora_jax.data.registry.tasks import FileSource, Prepare, mixture_rates, recipe_of, register
from aurora_jax.data.registry.vocabulary import Vocabulary, vocabulary_from
from aurora_jax.data.text.documents import FillInTheMiddle, Instruction
from aurora_jax.data.text.recipe import Recipe
from aurora_jax.data.text.sources import Source
from aurora_jax.errors import InputError
from aurora_jax.languages import LANGUAGES

DOCUMENTS = {
    "en": ["The quick brown fox.", "", "one<|endoftext|>two", "<|endoftext|>", "nul\0byte\0", "line\r\nline\u2028line"],
    "fi": ["Hyvää päivää, yöpöytä!", "Äiti lähti työhön."],
    "hi": ["नमस्ते दुनिया", "क्षत्रिय"],
    "ja": ["すべての人間は、生まれながらにして自由", "株式会社㈱"],
    "vi": ["Tất cả mọi người sinh ra", "đều được tự do"],
    "code": ["def f(x):\n\treturn x\n", "  \n\n  if (a  &&  b) {}\n"],
}
TEXTS = {language: [text for text in texts if text] for language, texts in DOCUMENTS.items()}
"""What is left of them: documents without a text are dropped."""


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for texts in DOCUMENTS.values() for text in texts], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return vocabulary_from(tmp_path / "tokenizer.json")


def write_corpus(directory: Path) -> Path:
    for part in ("train", "clean", "heldout"):
        (directory / part).mkdir(parents=True)
        for language, texts in DOCUMENTS.items():
            lines = [
                json.dumps({"text": text, "language": language, "source": "test", "license": "none"}) for text in texts
            ]
            (directory / part / f"{language}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def corpus(tmp_path: Path, vocabulary: Vocabulary) -> Path:
    """A registered corpus."""
    directory = write_corpus(tmp_path / "corpus")
    register(directory, vocabulary)
    return directory


def recipes_of(tasks: Iterable[str], split: str = "train") -> list[Recipe]:
    return [recipe_of(task, split) for task in tasks]


def seqio_documents(name: str, split: str) -> list[list[int]]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(sequence_length=None, split=split, shuffle=False)
    return [example["targets"].tolist() for example in dataset.as_numpy_iterator()]


def store_documents(store: TokenStore) -> list[list[int]]:
    return [store.document(index).tolist() for index in range(store.info.documents)]


def build(task: str, root: Path, split: str = "train", **options: Any) -> TokenStore:
    (store,) = build_stores([recipe_of(task, split)], root, **options).values()
    return store


@pytest.mark.parametrize("split", ["train", "validation"])
def test_store_equals_seqio(corpus: Path, tmp_path: Path, vocabulary: Vocabulary, split: str) -> None:
    stores = open_stores(recipes_of(MIXTURES["nano_cap"], split), tmp_path / "stores")
    assert stores.keys() == MIXTURES["nano_cap"].keys()
    for task, store in stores.items():
        texts = TEXTS[task.removeprefix("sample_")]
        assert store_documents(store) == seqio_documents(task, split)
        for text, ids in zip(texts, store_documents(store), strict=True):
            assert ids.count(0) == 1
            assert ids[-1] == 0
            assert vocabulary.decode_all(ids[:-1]) == text
        assert store.info.text_bytes == sum(len(text.encode()) for text in texts)
        assert store.info.language == task.removeprefix("sample_")


def test_mixture_is_seqios(corpus: Path) -> None:
    """Every task of the mixture comes out of SeqIO's own mixer, in the stated shares."""
    tasks = [f"sample_{language}" for language in LANGUAGES]
    rates = MIXTURES["nano_cap"]
    assert sum(rates.values()) == pytest.approx(1)
    assert mixture_rates("nano_cap") == tuple((task, pytest.approx(rates[task])) for task in sorted(tasks))
    dataset = seqio.get_mixture_or_task("nano_cap").get_dataset(None, "train", shuffle=False, num_epochs=None, seed=0)
    drawn = [tuple(example["targets"].tolist()) for example in dataset.take(600).as_numpy_iterator()]
    for task in tasks:
        documents = set(map(tuple, seqio_documents(task, "train")))
        assert sum(document in documents for document in drawn) == pytest.approx(600 * rates[task], abs=40)
    assert mixture_rates("sample_en") == (("sample_en", 1.0),)
    with pytest.raises(InputError, match="nano_cup"):
        mixture_rates("nano_cup")


def test_clean_differs_from_train(corpus: Path, tmp_path: Path) -> None:
    (corpus / "clean" / "en.jsonl").write_text('{"text": "clean", "language": "en"}\n')
    assert build("sample_clean_en", tmp_path).info.documents == 1
    assert build("sample_en", tmp_path).info.documents == len(TEXTS["en"])


@contextmanager
def registered(
    name: str, source: seqio.DataSource, preprocessors: list, vocabulary: seqio.Vocabulary, add_eos: bool = True
) -> Iterator[str]:
    features = {"targets": seqio.Feature(vocabulary, add_eos=True, dtype=tf.int32)}
    seqio.TaskRegistry.add(name, source=source, preprocessors=preprocessors, output_features=features)
    try:
        yield name
    finally:
        seqio.TaskRegistry.remove(name)


def json_lines(pattern: Path | str) -> FileSource:
    return FileSource(Source({"train": (str(pattern),)}, "jsonl", fields={"language": "language"}))


def test_without_eos(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """A task that appends none keeps its documents apart by offsets; empty ones vanish."""
    corpus = write_corpus(tmp_path / "corpus")
    with registered(
        "plain", json_lines(corpus / "train" / "*.jsonl"), [seqio.preprocessors.tokenize], vocabulary
    ) as task:
        store = build(task, tmp_path)
        assert (store.info.eos_id, store.info.language) == (None, "mul")
        assert store_documents(store) == [ids for ids in seqio_documents(task, "train") if ids]
        assert (
            np.flatnonzero(store.window_ends(np.array([0]), len(store))[0]).tolist()
            == (np.cumsum([len(ids) for ids in store_documents(store)]) - 1).tolist()
        )


def test_tokenizers_and_folders_stand_side_by_side(corpus: Path, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """Two registries make stores at once, each with its own tokenizer and folder; SeqIO's has the newest."""
    registries = [register(corpus, vocabulary), register(write_corpus(tmp_path / "other"), vocabulary_from("bytes"))]
    for registry in (registries[0], registries[1], registries[0]):
        recipe = registry.recipe("sample_fi", "train")
        store = open_stores([recipe], tmp_path / f"stores-{registry.vocabulary.sha256[:12]}")["sample_fi"]
        assert store.info.tokenizer_sha256 == registry.vocabulary.sha256
        assert recipe.reader.files("train")[0].url == f"{registry.root}/train/fi.jsonl"
        assert [registry.vocabulary.decode_all(ids[:-1]) for ids in store_documents(store)] == TEXTS["fi"]
    assert seqio.TaskRegistry.get("sample_fi").output_features["targets"].vocabulary == vocabulary_from("bytes")
    with pytest.raises(InputError, match="no_such_module"):
        register(corpus, vocabulary, ["no_such_module"])


def test_a_file_of_the_corpus_is_a_task_whatever_its_language(vocabulary: Vocabulary, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "train" / "sw.jsonl").write_text('{"text": "Jina langu ni"}\n')
    registry = register(corpus, vocabulary)
    assert registry.splits("sample_sw") == ("train", "validation")
    assert mixture_rates("sample_sw") == (("sample_sw", 1.0),)
    store = open_stores([registry.recipe("sample_sw", "train")], tmp_path / "stores")["sample_sw"]
    assert (store.info.language, store.info.documents) == ("sw", 1)


def test_a_mixture_may_be_written_out() -> None:
    assert mixture_rates("sample_fi=0.5,sample_en=.25") == (("sample_en", 0.25), ("sample_fi", 0.5))
    for wrong in ("sample_fi=", "sample_fi=0", "sample_fi=nan", "=1", "sample_fi=1,sample_fi=2", "sample_fi=1,"):
        with pytest.raises(InputError, match="Write each task once"):
            mixture_rates(wrong)


def test_missing_sources_are_named_together(vocabulary: Vocabulary, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    for language in ("vi", "hi"):
        (corpus / "train" / f"{language}.jsonl").unlink()
    register(corpus, vocabulary)
    recipes = recipes_of(MIXTURES["nano_cap"])
    with pytest.raises(InputError, match=r"(?s)2 of 6 tasks are missing.*train/hi\.jsonl.*train/vi\.jsonl"):
        build_stores(recipes, tmp_path / "stores")
    assert not (tmp_path / "stores").exists()
    built = build_stores(recipes, tmp_path / "stores", skip_missing=True)
    assert built.keys() == {f"sample_{language}/train" for language in ("en", "fi", "ja", "code")}
    with pytest.raises(InputError, match=r"2 of 2 tasks are missing"):
        open_stores(recipes, tmp_path / "stores")
    assert open_stores(recipes, tmp_path / "stores", skip_missing=True).keys() == {
        name.removesuffix("/train") for name in built
    }


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "not JSON"),
        ('{"txt": "a"}', "no field 'text'"),
        ('["text"]', "not a JSON object"),
        ('{"text": 3}', "field 'text' is no string"),
        ("", "not JSON"),
        ('{"text": "\\ud800"}', "not UTF-8"),
    ],
)
def test_bad_lines_are_put_aside(corpus: Path, tmp_path: Path, line: str, reason: str) -> None:
    """Too many of them: no store, and the source is named. A few: a store without them, and a file that says
    where they are and why."""
    path = corpus / "train" / "en.jsonl"
    place = path.stat().st_size
    path.write_text(path.read_text() + line + "\n")
    count = len(DOCUMENTS["en"]) + 1
    with pytest.raises(InputError, match=re.escape(f"sample_en/train: 1 of {count} records are bad ({reason} (1))")):
        build("sample_en", tmp_path)
    assert read_info(tmp_path / "sample_en" / "train") is None
    store = build("sample_en", tmp_path, max_bad_fraction=1 / count)
    assert [store.document(index)[:-1].tolist() for index in range(store.info.documents)] == [
        recipe_of("sample_en", "train").tokenizer.encode(text) for text in TEXTS["en"]
    ]
    (rejected,) = (tmp_path / "sample_en" / "train" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["where"] == f"{path}, byte {place:,}"
    assert json.loads(rejected)["reason"] == reason


def test_a_store_is_reused_or_refused(corpus: Path, tmp_path: Path) -> None:
    """Reused if nothing or only the time of the file has changed; refused if its content has, even at the same size."""
    build("sample_fi", tmp_path)
    place, source = tmp_path / "sample_fi" / "train" / "store.json", corpus / "train" / "fi.jsonl"
    made = place.stat().st_mtime_ns
    os.utime(source, ns=(1, 1))
    build("sample_fi", tmp_path)
    assert place.stat().st_mtime_ns == made

    content = source.read_text()
    for change in (content + '{"text": "lisää", "language": "fi"}\n', content.replace("Hyv", "Hyb")):
        source.write_text(change)
        for look in (lambda: build("sample_fi", tmp_path), lambda: open_stores(recipes_of(["sample_fi"]), tmp_path)):
            with pytest.raises(InputError, match="made of other records than its sources hold now"):
                look()
    assert place.stat().st_mtime_ns == made
    source.unlink()
    assert open_stores(recipes_of(["sample_fi"]), tmp_path).keys() == {"sample_fi"}, "a pod does not see the sources"


def test_the_fingerprint_follows_what_matters(corpus: Path, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """Split, tokenizer, preprocessors and their arguments change it; the folder does not."""
    here = recipe_of("sample_en", "train").fingerprint
    assert recipe_of("sample_en", "validation").fingerprint != here
    moved = FileSource(
        Source({"train": ("/elsewhere/en.jsonl",)}, "jsonl", fields={"language": "language"}, language="en")
    )

    def fingerprint(vocabulary: Vocabulary, *preprocessors: Any) -> str:
        with registered("other", moved, list(preprocessors) or [Prepare()], vocabulary) as task:
            return recipe_of(task, "train").fingerprint

    assert fingerprint(vocabulary) == here
    assert fingerprint(vocabulary, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos) == here
    changed = tmp_path / "changed.json"
    changed.write_bytes(Path(vocabulary.tokenizer.path).read_bytes() + b"\n")
    others = [
        fingerprint(vocabulary_from(changed)),
        fingerprint(vocabulary, _lower, Prepare()),
        fingerprint(vocabulary, Prepare(FillInTheMiddle())),
        fingerprint(vocabulary, Prepare(FillInTheMiddle(rate=0.25))),
    ]
    assert len({here, *others}) == 5
    build("sample_en", tmp_path)
    with pytest.raises(InputError, match=here[:16]):
        TokenStore.open(tmp_path / "sample_en" / "train", others[0])


def _lower(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda example: example | {"targets": tf.strings.lower(example["targets"], encoding="utf-8")})


def test_preprocessors_of_seqio_are_applied(corpus: Path, tmp_path: Path, vocabulary: Vocabulary) -> None:
    steps = [_lower, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    with registered("lower", json_lines(corpus / "train" / "*.jsonl"), steps, vocabulary) as task:
        store = build(task, tmp_path)
        # SeqIO's own steps make a lone EOS of a document without a text.
        assert store_documents(store) == [ids for ids in seqio_documents(task, "train") if ids != [0]]
        assert "the quick brown fox.<|endoftext|>" in [vocabulary.decode_all(ids) for ids in store_documents(store)]


def test_sources_of_seqio_are_read(tmp_path: Path, vocabulary: Vocabulary) -> None:
    """A TextLineDataSource of two shards, and its order."""
    for shard in range(2):
        (tmp_path / f"text-{shard}").write_text("".join(f"line {number} of {shard}\n" for number in range(20)))
    rekey = functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"})
    source = seqio.TextLineDataSource({"train": str(tmp_path / "text-*")})
    with registered("text_lines", source, [_as_text, rekey, Prepare()], vocabulary) as task:
        store = build(task, tmp_path / "stores")
        texts = [vocabulary.decode_all(ids[:-1]) for ids in store_documents(store)]
        assert texts == [f"line {number} of {shard}" for shard in range(2) for number in range(20)]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_is_read(tmp_path: Path, vocabulary: Vocabulary, file_format: str) -> None:
    """A data set prepared by TFDS: through SeqIO's own source, and by its files."""
    import tensorflow_datasets as tfds

    texts = [f"{number}: {text}" for number in range(9) for text in DOCUMENTS["hi"]]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="small_hindi",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        split_datasets={"train": tf.data.Dataset.from_tensor_slices({"text": texts})},
        data_dir=tmp_path,
        file_format=file_format,
    )
    rekey = functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"})
    through_seqio = seqio.TfdsDataSource(tfds_name="small_hindi:1.0.0", tfds_data_dir=str(tmp_path), splits=["train"])
    by_files = FileSource(Source({"train": (f"{tmp_path}/small_hindi/1.0.0/*-train.{file_format}*",)}, file_format))  # type: ignore[arg-type]
    found = []
    roads = [("by_files", by_files, []), ("through_seqio", through_seqio, [rekey])]
    # TFDS itself makes no tf.data dataset of ArrayRecord files, which SeqIO asks for.
    for name, source, before in roads if file_format == "tfrecord" else roads[:1]:
        with registered(name, source, [*before, Prepare()], vocabulary) as task:
            found.append([vocabulary.decode_all(ids[:-1]) for ids in store_documents(build(task, tmp_path / "stores"))])
    assert sorted(found[0]) == sorted(texts)
    assert found.count(found[0]) == len(found)


def _cut(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
    return dataset.map(lambda example: example | {"targets": tf.strings.substr(example["targets"], 0, length)})


def _as_text(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda line: {"text": line})


def test_steps_give_the_same_in_seqio_and_in_the_store(tmp_path: Path, vocabulary: Vocabulary) -> None:
    """Instructions: the same tokens from both, and the questions are not to be learnt."""
    pairs = [{"q": f"What is {number} + 1?", "a": f"{number + 1}."} for number in range(30)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = FileSource(
        Source({"train": (f"{tmp_path}/qa.jsonl",)}, "jsonl", text=None, fields={"instruction": "q", "response": "a"})
    )
    with registered("questions", source, [Prepare(Instruction(learn="response"))], vocabulary) as task:
        store = build(task, tmp_path / "stores")
        documents = store_documents(store)
        assert documents == seqio_documents(task, "train")
        (learn,) = store.window_learn(np.array([0]), len(store))
        place = 0
        for pair, ids in zip(pairs, documents, strict=True):
            assert vocabulary.decode_all(ids[:-1]) == f"### Instruction:\n{pair['q']}\n### Response:\n{pair['a']}"
            answer = [*vocabulary.encode(pair["a"]), 0]
            assert learn[place : place + len(ids)].tolist() == [False] * (len(ids) - len(answer)) + [True] * len(answer)
            place += len(ids)


def test_unsuitable_tasks_are_refused(corpus: Path, vocabulary: Vocabulary) -> None:
    def recipe(preprocessors: list, vocabulary: seqio.Vocabulary) -> None:
        with registered("unsuitable", json_lines(corpus / "train" / "en.jsonl"), preprocessors, vocabulary) as task:
            recipe_of(task, "train")

    with pytest.raises(InputError, match="append_eos_after_trim"):
        recipe([seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim], vocabulary)
    with pytest.raises(InputError, match="ByteVocabulary"):
        recipe([seqio.preprocessors.tokenize], seqio.ByteVocabulary())
    with pytest.raises(InputError, match="needs length"):
        recipe([_cut, Prepare()], vocabulary)
    with pytest.raises(InputError, match="no SeqIO task is named 'nothing'"):
        recipe_of("nothing", "train")
    with pytest.raises(InputError, match="no split 'test'; it has: train, validation"):
        recipe_of("sample_en", "test")
