"""SeqIO tasks and the stores built from them, held against SeqIO's own view of the same tasks."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tokenizers

from aurora_jax.data.store import TokenStore, build_mixture_stores, build_store, read_info, task_fingerprint
from aurora_jax.data.tasks import LANGUAGES, MIXTURES, JsonLinesSource, mixture_rates, register_sample_tasks, unregister_sample_tasks
from aurora_jax.data.vocabulary import HuggingFaceVocabulary
from aurora_jax.errors import InputError

DOCUMENTS = {
    "en": ["The quick brown fox.", "", "one<|endoftext|>two", "<|endoftext|>", "nul\0byte\0", "line\r\nline\u2028line"],
    "fi": ["Hyvää päivää, yöpöytä!", "Äiti lähti työhön."],
    "hi": ["नमस्ते दुनिया", "क्षत्रिय"],
    "ja": ["すべての人間は、生まれながらにして自由", "株式会社㈱"],
    "vi": ["Tất cả mọi người sinh ra", "đều được tự do"],
    "code": ["def f(x):\n\treturn x\n", "  \n\n  if (a  &&  b) {}\n"],
}


@pytest.fixture
def vocabulary(tmp_path: Path) -> HuggingFaceVocabulary:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for texts in DOCUMENTS.values() for text in texts], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return HuggingFaceVocabulary(tmp_path / "tokenizer.json")


def write_corpus(directory: Path) -> Path:
    for part in ("train", "clean", "heldout"):
        (directory / part).mkdir(parents=True)
        for language, texts in DOCUMENTS.items():
            lines = [json.dumps({"text": text, "language": language, "source": "test", "license": "none"}) for text in texts]
            (directory / part / f"{language}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture
def corpus(tmp_path: Path, vocabulary: HuggingFaceVocabulary) -> Iterator[Path]:
    """A registered corpus."""
    directory = write_corpus(tmp_path / "corpus")
    register_sample_tasks(directory, vocabulary)
    yield directory
    unregister_sample_tasks()


def seqio_documents(name: str, split: str) -> list[list[int]]:
    dataset = seqio.get_mixture_or_task(name).get_dataset(sequence_length=None, split=split, shuffle=False)
    return [example["targets"].tolist() for example in dataset.as_numpy_iterator()]


def store_documents(store: TokenStore) -> list[list[int]]:
    return [store.document(index).tolist() for index in range(store.info.documents)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_store_equals_seqio(corpus: Path, tmp_path: Path, vocabulary: HuggingFaceVocabulary, split: str) -> None:
    stores = build_mixture_stores("nano_cap", tmp_path / "stores", split, show_progress=False)
    assert stores.keys() == MIXTURES["nano_cap"].keys()
    for task, store in stores.items():
        texts = DOCUMENTS[task.removeprefix("sample_")]
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
    assert build_store("sample_clean_en", "train", tmp_path / "a", show_progress=False).info.documents == 1
    assert build_store("sample_en", "train", tmp_path / "b", show_progress=False).info.documents == len(DOCUMENTS["en"])


def test_without_eos(vocabulary: HuggingFaceVocabulary, tmp_path: Path) -> None:
    """A task that appends none keeps its documents apart by offsets; empty ones vanish."""
    corpus = write_corpus(tmp_path / "corpus")
    seqio.TaskRegistry.add(
        "plain",
        source=JsonLinesSource({"train": str(corpus / "train" / "*.jsonl")}),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"targets": seqio.Feature(vocabulary, dtype=tf.int32)},
    )
    try:
        store = build_store("plain", "train", tmp_path / "s", show_progress=False)
        assert (store.info.eos_id, store.info.language) == (None, "mul")
        assert store_documents(store) == [ids for ids in seqio_documents("plain", "train") if ids]
        assert (
            np.flatnonzero(store.window_ends(np.array([0]), len(store))[0]).tolist()
            == (np.cumsum([len(ids) for ids in store_documents(store)]) - 1).tolist()
        )
    finally:
        seqio.TaskRegistry.remove("plain")


def test_registering_again(corpus: Path, vocabulary: HuggingFaceVocabulary, tmp_path: Path) -> None:
    register_sample_tasks(corpus, vocabulary)
    other = write_corpus(tmp_path / "other")
    with pytest.raises(InputError, match=f"{corpus} .*{other} "):
        register_sample_tasks(other, vocabulary)


def test_incomplete_corpus(tmp_path: Path, vocabulary: HuggingFaceVocabulary) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "heldout" / "vi.jsonl").unlink()
    with pytest.raises(InputError, match=r"heldout/vi\.jsonl is missing"):
        register_sample_tasks(corpus, vocabulary)


@pytest.mark.parametrize("line", ["not json", '{"txt": "a"}', '["text"]', '{"text": 3}', "", '{"text": "\\ud800"}'])
def test_malformed_line_is_named(corpus: Path, tmp_path: Path, line: str) -> None:
    path = corpus / "train" / "en.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=rf"{path}, line {len(DOCUMENTS['en']) + 1}: not a JSON object"):
        build_store("sample_en", "train", tmp_path / "s", show_progress=False)
    assert not [left for left in (tmp_path / "s").rglob("*") if left.is_file()]


def test_store_is_reused_or_refused(corpus: Path, tmp_path: Path, vocabulary: HuggingFaceVocabulary) -> None:
    build_store("sample_fi", "train", tmp_path / "s", show_progress=False)
    made = (tmp_path / "s" / "store.json").stat().st_mtime_ns
    build_store("sample_fi", "train", tmp_path / "s", show_progress=False)
    assert (tmp_path / "s" / "store.json").stat().st_mtime_ns == made

    before = task_fingerprint("sample_fi", "train")
    with (corpus / "train" / "fi.jsonl").open("a") as file:
        file.write('{"text": "lisää", "language": "fi"}\n')
    after = task_fingerprint("sample_fi", "train")
    with pytest.raises(InputError, match=f"{before[:16]}.*{after[:16]}"):
        build_store("sample_fi", "train", tmp_path / "s", show_progress=False)
    info = read_info(tmp_path / "s")
    assert info is not None
    assert info.fingerprint == before


def test_fingerprint_follows_what_matters(corpus: Path, tmp_path: Path, vocabulary: HuggingFaceVocabulary) -> None:
    """Split, tokenizer and preprocessors change it; the folder does not."""
    here = task_fingerprint("sample_en", "train")
    assert task_fingerprint("sample_en", "validation") != here

    def fingerprint(vocabulary: HuggingFaceVocabulary, *extra: object) -> str:
        preprocessors = [*extra, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
        features = {"targets": seqio.Feature(vocabulary, dtype=tf.int32)}
        source = JsonLinesSource({"train": str(moved / "train" / "en.jsonl")})
        seqio.TaskRegistry.add("other", source=source, preprocessors=preprocessors, output_features=features)
        try:
            return task_fingerprint("other", "train")
        finally:
            seqio.TaskRegistry.remove("other")

    moved = write_corpus(tmp_path / "moved")
    assert fingerprint(vocabulary) == here
    assert fingerprint(vocabulary, _lower) != here
    changed = tmp_path / "changed.json"
    changed.write_bytes(vocabulary.path.read_bytes() + b"\n")
    assert fingerprint(HuggingFaceVocabulary(changed)) != here


def _lower(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda example: example | {"targets": tf.strings.lower(example["targets"], encoding="utf-8")})


def test_text_preprocessors_are_applied(corpus: Path, tmp_path: Path, vocabulary: HuggingFaceVocabulary) -> None:
    seqio.TaskRegistry.add(
        "lower",
        source=JsonLinesSource({"train": str(corpus / "train" / "*.jsonl")}),
        preprocessors=[_lower, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary, dtype=tf.int32)},
    )
    try:
        store = build_store("lower", "train", tmp_path / "s", show_progress=False)
        assert store_documents(store) == seqio_documents("lower", "train")
        assert "the quick brown fox.<|endoftext|>" in [vocabulary.decode_all(ids) for ids in store_documents(store)]
    finally:
        seqio.TaskRegistry.remove("lower")


def test_unsuitable_tasks_are_refused(corpus: Path, tmp_path: Path, vocabulary: HuggingFaceVocabulary) -> None:
    def build(preprocessors: list, vocabulary: seqio.Vocabulary) -> None:
        features = {"targets": seqio.Feature(vocabulary, dtype=tf.int32)}
        source = JsonLinesSource({"train": str(corpus / "train" / "en.jsonl")})
        seqio.TaskRegistry.add("unsuitable", source=source, preprocessors=preprocessors, output_features=features)
        try:
            build_store("unsuitable", "train", tmp_path / "s", show_progress=False)
        finally:
            seqio.TaskRegistry.remove("unsuitable")

    with pytest.raises(InputError, match="append_eos_after_trim"):
        build([seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim], vocabulary)
    with pytest.raises(InputError, match="ByteVocabulary"):
        build([seqio.preprocessors.tokenize], seqio.ByteVocabulary())
    with pytest.raises(InputError, match="no SeqIO task is named 'nothing'"):
        build_store("nothing", "train", tmp_path / "s")
    with pytest.raises(InputError, match="no split 'test'; it has: train, validation"):
        build_store("sample_en", "test", tmp_path / "s")
