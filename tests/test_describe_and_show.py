"""`aurora data describe` and `aurora data show`, held against the loader and against the `tokenizers` library."""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from matplotlib.image import imread
from rich.console import Console
from stores import write_store

from aurora_jax.cli import main
from aurora_jax.data.batches.loader import DataStage, Loader, stage_over
from aurora_jax.data.batches.store import TokenStore
from aurora_jax.data.corpora.aurora_m.tasks import ENTRIES
from aurora_jax.data.corpora.catalogue import MIXTURES
from aurora_jax.data.look.describe import markdown
from aurora_jax.data.look.inventory import rates_of, shares, task_rows
from aurora_jax.data.look.show import PARTIAL, print_row, read_row, spans_of
from aurora_jax.data.look.show_page import harmless
from aurora_jax.data.text.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from aurora_jax.errors import InputError

TEXTS = {
    "en": ["All human beings are born free.", "A <tag> & more.", "So it goes."],
    "ja": ["すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。"] * 4,
    "code": ["def f(x):\n\treturn x\r\n", "\x1b[31mred\x1b[0m"],
}


@pytest.fixture
def tokenizer(mini_tokenizer: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(mini_tokenizer)


@pytest.fixture
def stores(tmp_path: Path, tokenizer: HuggingFaceTokenizer) -> Path:
    """Stores of all tasks of nano_cap, with their documents over and over."""
    for language in ("en", "fi", "hi", "ja", "vi", "code"):
        texts = TEXTS.get(language, TEXTS["en"]) * 20
        documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        learn = None
        if language == "fi":  # the first three tokens of each document are not learnt
            learn = [place >= 3 for document in documents for place in range(len(document))]
        write_store(
            tmp_path / "stores" / f"sample_{language}" / "train",
            documents,
            vocab_size=tokenizer.vocab_size,
            learn=learn,
            task=f"sample_{language}",
            language=language,
            tokenizer_sha256=tokenizer.sha256,
            eos_id=tokenizer.eos_id,
        )
    return tmp_path / "stores"


def open_all(stores: Path) -> dict[str, TokenStore]:
    return {
        f"sample_{name}": TokenStore.open(stores / f"sample_{name}" / "train")
        for name in ("en", "fi", "hi", "ja", "vi", "code")
    }


def loader_over(stores: dict[str, TokenStore], steps: int = 40, length: int = 48, seed: int = 3) -> Loader:
    stage = stage_over(stores, "nano_cap", tuple(sorted(MIXTURES["nano_cap"].items())), steps)
    return Loader(stores, [stage], batch_size=8, sequence_length=length, seed=seed)


# ---------------------------------------------------------------- describe


@pytest.mark.parametrize("mixture", MIXTURES)
def test_describe_needs_no_file_store_or_tensorflow(mixture, tmp_path):
    code = (
        "import sys; from aurora_jax.cli import main\n"
        f"assert main(['data', 'describe', {mixture!r}, '--data-root', 'nowhere', '--steps', '10']) == 0\n"
        "assert not {'tensorflow', 'seqio', 'jax', 'apache_beam'} & set(sys.modules)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "COLUMNS": "200", "PATH": "/usr/bin:/bin"}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    for task in MIXTURES[mixture]:
        assert re.search(rf"│ {task} .* missing ", said)
        assert f"  {task}  " in said
    assert "files of 0 are there" in said
    assert list(tmp_path.iterdir()) == []


def test_describe_counts_files_stores_and_epochs(tmp_path, stores, mini_corpus):
    rates = rates_of("nano_cap", str(mini_corpus), ())
    steps, loader = 64, loader_over(open_all(stores), steps=65)  # two blocks, after which rates hold exactly
    rows = task_rows(rates, str(mini_corpus), str(stores), steps * 8, 48)
    assert [row.rate for row in rows] == sorted((row.rate for row in rows), reverse=True)
    assert sum(row.rate for row in rows) == pytest.approx(1)
    for row in rows:
        language = row.name.removeprefix("sample_")
        (file,) = row.found
        assert (Path(file.url), file.size) == (
            (path := mini_corpus / "train" / f"{language}.jsonl"),
            path.stat().st_size,
        )
        assert row.store == open_all(stores)[row.name].info
        windows = -(-(row.store.tokens - 1) // 48)
        assert row.epochs == pytest.approx(loader.position(steps)["epochs"][row.name], abs=1 / windows)
    assert shares(rows, "language") == pytest.approx(
        {"en": 0.28, "code": 0.24, "fi": 0.12, "hi": 0.12, "ja": 0.12, "vi": 0.12}
    )
    unplanned = task_rows(rates, str(mini_corpus), str(tmp_path / "none"))
    assert all(row.store is None and row.epochs is None for row in unplanned)


def test_describe_draws_and_writes_markdown(tmp_path, capsys):
    arguments = ["data", "describe", "aurora_m_cap", "--data-root", str(tmp_path), "--tokens", "377e9"]
    assert main([*arguments, "--picture", str(tmp_path / "chart.png"), "--markdown", str(tmp_path / "tasks.md")]) == 0
    assert "376,999,999,488 tokens" in " ".join(capsys.readouterr().out.split())
    picture = imread(tmp_path / "chart.png")[:, :, :3]
    assert min(picture.shape[:2]) > 500
    assert len(np.unique((picture * 255).astype(int).reshape(-1, 3), axis=0)) > 20  # not an empty canvas
    lines = (tmp_path / "tasks.md").read_text().splitlines()
    assert len(lines) == 2 + len(MIXTURES["aurora_m_cap"])
    for entry in ENTRIES:
        if "cap" in entry.stages:
            (line,) = [line for line in lines if line.startswith(f"| {entry.task('cap')} |")]
            assert f"`{entry.origin}/{entry.files[0]}" in line
            assert str(tmp_path) not in line
    assert main([*arguments, "--picture", str(tmp_path / "chart.pdf")]) == 2
    assert main([*arguments, "--picture", str(tmp_path / "no" / "chart.png")]) == 2
    assert main([*arguments, "--steps", "3"]) == 2
    assert "not both" in capsys.readouterr().err
    assert main(["data", "describe", "aurora_m_cup"]) == 2
    assert "aurora_m_cap" in capsys.readouterr().err


def test_the_document_holds_the_tables():
    document = (Path(__file__).parents[1] / "docs" / "aurora_m_data.md").read_text()
    for mixture in ("aurora_m_cap", "aurora_m_cat"):
        assert markdown(task_rows(rates_of(mixture, "nowhere", ()), "nowhere", "nowhere")) in document


MODULE = """
import seqio
import tensorflow as tf
from aurora_jax.data.text.sources import Source
from aurora_jax.data.registry.tasks import FileSource, Prepare
from aurora_jax.data.registry.vocabulary import vocabulary_from

features = {"targets": seqio.Feature(vocabulary_from("bytes"), add_eos=True, dtype=tf.int32)}
source = Source({"train": ("FOLDER/*.jsonl",)}, "jsonl", language="et", license="CC0")
seqio.TaskRegistry.add("theirs_files", FileSource(source), features, [Prepare()])
def text(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensors({"targets": "x"})
function = seqio.FunctionDataSource(text, ["train"])
seqio.TaskRegistry.add("theirs_function", function, features, [Prepare()])
seqio.MixtureRegistry.add("theirs", [("theirs_files", 3), ("theirs_function", 1), ("sample_en", 4)])
"""


def test_tasks_of_other_modules_say_what_they_can(tmp_path, monkeypatch, capsys):
    (tmp_path / "their_tasks.py").write_text(MODULE.replace("FOLDER", str(tmp_path)))
    (tmp_path / "some.jsonl").write_text('{"text": "tere"}\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    import seqio

    try:
        arguments = [
            "data",
            "describe",
            "theirs",
            "--modules",
            "their_tasks",
            "--data-root",
            str(tmp_path),
            "--stores",
            str(tmp_path),
        ]
        assert main([*arguments, "--picture", str(tmp_path / "chart.png")]) == 0
        said = capsys.readouterr().out
        assert re.search(r"theirs_files +│ et +│ – +│ 37\.5% │ 1 \(17 B\) │", said)
        assert re.search(r"theirs_function +│ – +│ – +│ 12\.5% │ +– │", said)
        assert re.search(r"sample_en +│ en +│ – +│ 50\.0% │ +missing │", said)
        assert "theirs_function  by FunctionDataSource" in said
        assert "some.jsonl" not in markdown(
            task_rows(rates_of("theirs", str(tmp_path), ("their_tasks",)), str(tmp_path), str(tmp_path))
        )
    finally:
        seqio.MixtureRegistry.remove("theirs")
        for task in ("theirs_files", "theirs_function"):
            seqio.TaskRegistry.remove(task)


# ---------------------------------------------------------------- show


def test_show_is_the_loaders_batch_decoded(stores, tokenizer, mini_tokenizer):
    """Every row of some steps: the runs are the batch's tokens, their texts what `tokenizers` decodes, their
    losses its weights."""
    opened = open_all(stores)
    loader = loader_over(opened)
    reference = tokenizers.Tokenizer.from_file(str(mini_tokenizer / "tokenizer.json"))
    stage = stage_over(opened, "s", tuple(sorted(MIXTURES["nano_cap"].items())), 40)
    isolated = Loader(opened, [stage], batch_size=8, sequence_length=48, seed=3, attend_across_documents=False)
    seen = set()
    for step in (0, 7, 39):
        batch, documents = loader.batch(step), isolated.batch(step)
        for number in range(8):
            row = read_row(loader, opened, tokenizer, step, number)
            valid = int(batch.segment_ids_BL[number].sum())
            assert row.padding == 48 - valid
            ids = [*batch.tokens_BL[number, :1], *batch.targets_BL[number, :valid]]
            assert [i for run in row.spans for i in run.ids] == ids
            assert [run.position for run in row.spans] == np.cumsum([0, *(len(run.ids) for run in row.spans)])[
                :-1
            ].tolist()
            shown = "".join(run.text for run in row.spans)
            decoded = reference.decode(ids, skip_special_tokens=False)
            # Only characters that the row's ends cut through differ.
            assert shown.strip(PARTIAL) == decoded.strip("\ufffd")
            assert row.learnt == batch.loss_weights_BL[number].sum()
            for run in row.spans:
                if run.position:
                    weights = batch.loss_weights_BL[number, run.position - 1 : run.position - 1 + len(run.ids)]
                    assert (weights > 0).tolist() == [run.loss] * len(run.ids)
                if run.position < valid:
                    assert documents.segment_ids_BL[number, run.position] - 1 == run.document
                assert run.special == (run.ids[0] in reference.get_added_tokens_decoder())
            task = loader.tasks[batch.task_ids_B[number]]
            assert (row.place.task, row.language) == (task, task.removeprefix("sample_"))
            assert opened[task].read(row.place.start, row.place.start + valid + 1).tolist() == ids
            seen.add(task)
    assert seen == set(MIXTURES["nano_cap"])


def test_epoch_position_follows_the_loader(stores, tokenizer):
    opened = open_all(stores)
    loader = loader_over(opened)
    for step in (0, 13, 38):
        places = [loader.place(step, row) for row in range(8)]
        before, after = loader.position(step)["epochs"], loader.position(step + 1)["epochs"]
        for place in places:
            assert before[place.task] - 1e-9 <= place.epoch + place.turn / place.windows < after[place.task]
    stages = [DataStage("one", (("sample_ja", 1.0),), 3), DataStage("two", (("sample_ja", 1.0),), 9)]
    one = Loader(opened, stages, batch_size=4, sequence_length=48, seed=0)
    places = [one.place(step, row) for step in range(12) for row in range(4)]
    assert [place.epoch * place.windows + place.turn for place in places] == list(
        range(48)
    )  # epochs go on across stages
    assert len({(place.epoch, place.start) for place in places}) == 48
    assert all(place.start % 48 == 0 and place.start < len(opened["sample_ja"]) for place in places)
    assert (one.place(4, 0).stage, one.place(4, 0).stage_step) == ("two", 1)
    for step, row in ((12, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(InputError, match="outside"):
            read_row(one, opened, tokenizer, step, row)


def test_characters_of_several_tokens_are_shown_whole(tokenizer):
    text = "日本語 ñ 🦜 🇫🇮 नमस्ते!"  # none of it is in the little vocabulary: bytes and pieces of characters
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    runs = list(spans_of(ids, [True] * len(ids), [0] * len(ids), tokenizer))
    assert "".join(run.text for run in runs) == text
    assert any(len(run.ids) > 1 for run in runs)
    assert [run.text for run in spans_of(tokenizer.encode("\ufffd"), [True] * 3, [0] * 3, tokenizer)] == [
        "\ufffd"
    ]  # the character itself
    cut = list(spans_of(ids[1:-1], [True] * (len(ids) - 2), [0] * (len(ids) - 2), tokenizer))
    assert PARTIAL in cut[0].text
    assert not any("\ufffd" in run.text for run in cut)
    raw = ByteTokenizer()
    ids = [*raw.encode("ä🦜"), raw.eos_id]
    assert [run.text for run in spans_of(ids, [True] * 7, [0] * 7, raw)] == ["ä", "🦜", "</s>"]


def test_sentencepiece_keeps_its_spaces(tmp_path):
    import sentencepiece

    from aurora_jax.data.text.tokenizer import SentencePieceTokenizer

    text = "the quick brown fox jumps over the lazy dog"
    (tmp_path / "text").write_text((text + "\n") * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=30, minloglevel=2
    )
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    runs = list(spans_of(ids, [True] * len(ids), [0] * len(ids), tokenizer))
    assert "".join(run.text for run in runs) == f" {text}</s>"  # SentencePiece begins every text with a space


class Spans(HTMLParser):
    """What the page's <pre> shows: (classes, title, text) of each span."""

    def __init__(self) -> None:
        super().__init__()
        self.within = False
        self.spans: list[tuple[set[str], str, str]] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.within |= tag == "pre"
        if self.within and tag == "span":
            fields = dict(attributes)
            self.spans.append((set(fields["class"].split()), fields["title"], ""))

    def handle_endtag(self, tag: str) -> None:
        self.within &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if self.within and self.spans:
            classes, title, text = self.spans[-1]
            self.spans[-1] = (classes, title, text + data)


def test_show_on_the_command_line_and_as_a_page(stores, tokenizer, mini_tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    opened = open_all(stores)
    loader = loader_over(opened)
    step = 5
    number = next(row for row in range(8) if loader.place(step, row).task == "sample_fi")
    row = read_row(loader, opened, tokenizer, step, number)
    show = [
        "data",
        "show",
        "nano_cap",
        "--stores",
        str(stores),
        "--seed",
        "3",
        "--batch-size",
        "8",
        "--sequence-length",
        "48",
    ]
    named = [*show, "--tokenizer", str(mini_tokenizer), "--step", str(step), "--row", str(number)]
    assert main([*named, "--html", str(tmp_path / "row.html")]) == 0
    said = capsys.readouterr().out
    for name, value in row.facts:
        assert re.search(rf"{name} +{re.escape(value)}", said)
    for line in "".join(run.text for run in row.spans).splitlines():
        assert harmless(line).expandtabs() in said.replace("\t", "        ") or harmless(line) in said

    page = Spans()
    page.feed((tmp_path / "row.html").read_text())
    assert [text for _, _, text in page.spans] == [harmless(run.text) for run in row.spans]
    for (classes, title, _), run in zip(page.spans, row.spans, strict=True):
        assert ("silent" in classes, "special" in classes) == (not run.loss, run.special)
        assert f"id {' '.join(map(str, run.ids))}" in html.unescape(title)
    assert 0 < row.learnt < row.targets  # the masked task

    assert main([*show, "--tokenizer", str(mini_tokenizer), "--row", "8"]) == 2
    assert "rows [0, 8)" in capsys.readouterr().err
    assert main(show) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert main([*show, "--tokenizer", "bytes"]) == 2
    assert tokenizer.sha256[:12] in capsys.readouterr().err
    assert main(["data", "show", "aurora_m_cap", "--stores", str(stores), "--tokenizer", str(mini_tokenizer)]) == 2
    assert "aurora_wikipedia_fi" in capsys.readouterr().err
    assert (
        main(
            [
                "data",
                "show",
                "aurora_m_cap",
                "--stores",
                str(stores),
                "--tokenizer",
                str(mini_tokenizer),
                "--skip-missing",
            ]
        )
        == 2
    )
    assert "none of its tasks has a store" in capsys.readouterr().err


def test_colours_mark_documents_loss_and_special_tokens(stores, tokenizer):
    opened = open_all(stores)
    loader = loader_over(opened)
    number = next(row for row in range(8) if loader.place(0, row).task == "sample_code")
    row = read_row(loader, opened, tokenizer, 0, number)
    console = Console(force_terminal=True, color_system="standard", width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_row(row, console)
    said = console.export_text(styles=True)
    assert len({run.document for run in row.spans}) > 1
    assert re.search(r"\x1b\[[\d;]*7;3\dm<\|endoftext\|>", said)  # reversed
    assert re.search(r"\x1b\[2;4;36m", said)  # the first token: dim, underlined, first colour
    assert "\x1b[31mred" not in said  # the document's own escape is a picture of itself
    assert "␛[31mred" in said.replace("\x1b[0m", "") or "␛" in said


CONFIG = """
from pathlib import Path
from aurora_jax.model.config import PRESETS
from aurora_jax.train.config import DataConfig, TrainConfig
from aurora_jax.train.stages import LearningRate, Stage

def config():
    return TrainConfig(
        output=Path("run"),
        model=PRESETS["tiny_starcoder_py"],
        seed=3,
        stages=(Stage("cap", "nano_cap", 10, LearningRate(1e-3)), Stage("again", "nano_base", 5)),
        data=DataConfig(corpus=Path("corpus"), tokenizer=Path({tokenizer!r}), stores={stores!r}, batch_size=8,
                        sequence_length=48, attend_across_documents={across}),
    )
"""


@pytest.mark.parametrize("across", [True, False])
def test_show_takes_stages_sizes_and_masks_from_a_config(stores, tokenizer, mini_tokenizer, tmp_path, capsys, across):
    path = tmp_path / "config.py"
    content = CONFIG.replace("{tokenizer!r}", repr(str(mini_tokenizer))).replace("{stores!r}", repr(str(stores)))
    path.write_text(content.replace("{across}", str(across)))
    opened = open_all(stores)
    stages = [
        stage_over(opened, name, tuple(sorted(MIXTURES[mixture].items())), steps)
        for name, mixture, steps in (("cap", "nano_cap", 10), ("again", "nano_base", 5))
    ]
    loader = Loader(opened, stages, batch_size=8, sequence_length=48, seed=3, attend_across_documents=across)
    row = read_row(loader, opened, tokenizer, 12, 6)
    assert main(["data", "show", str(path), "--step", "12", "--row", "6"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "step 12 (step 2 of stage again)" in said
    for name, value in row.facts:
        assert f"{name} {value}" in said
    assert main(["data", "show", str(path), "--step", "15"]) == 2
    assert "[0, 15)" in capsys.readouterr().err
    assert json.loads(json.dumps(row.place._asdict()))["stage"] == "again"
