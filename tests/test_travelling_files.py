"""What travels with a model besides its weights: every small text and the tokenizer, byte for byte; the rest
is named."""

import dataclasses
import json
import re
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from resealing import as_format_1, reseal
from test_convert import assert_refused, make_model

from aurora_jax.checkpoints import format as checkpoint
from convert import travelling
from convert.__main__ import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TRAVELLERS = {
    "tokenizer.json": '{"ä": 1}\r\n'.encode(),
    "tokenizer.model": bytes(range(256)) * 9,
    "spiece.model": b"\xff\x00",
    "added_tokens.json": b'{"<x>": 96}',
    "vocab.json": b'{"a": 0}',
    "merges.txt": "#version: 0.2\nĠ t\n".encode(),
    "special_tokens_map.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": null}',
    "chat_template.jinja": b"{% for message in messages %}{{ message }}{% endfor %}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}\n",
    "generation_config.json": b'{\r\n"eos_token_id": [0, 5], "temperature": 0.2}',
    "LICENSE": b"",
    "README.md": "\ufeff---\nlicense: bigcode-openrail-m\n---\nMalli\r\n".encode(),
    "NOTICE.txt": b"no newline at the end",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "modeling_notes.py": b"# a program is text\n",
}


@pytest.fixture
def hf(tmp_path) -> Path:
    make_model().save_pretrained(tmp_path / "hf")
    put(tmp_path / "hf", TRAVELLERS)
    return tmp_path / "hf"


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_all_small_text_arrives_byte_for_byte(tmp_path, hf):
    assert main(["from-torch", str(hf), str(tmp_path / "ours")]) == 0
    assert checkpoint.read_files(tmp_path / "ours") == TRAVELLERS
    assert main(["to-torch", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    back = contents(tmp_path / "back")
    assert {*back} == {*TRAVELLERS, "config.json", "model.safetensors"}
    assert {name: back[name] for name in TRAVELLERS} == TRAVELLERS
    shown = ocp.JsonCheckpointHandler().restore(tmp_path / "ours" / "tokenizer")
    assert shown["NOTICE.txt"] == TRAVELLERS["NOTICE.txt"].decode()  # text stays readable


def test_what_stays_behind_is_named(tmp_path, hf, monkeypatch, capsys):
    monkeypatch.setattr(travelling, "LARGEST_TEXT", 1000)
    put(hf, {"logo.png": b"\x89PNG\r\n\x1a\n\x00", "log.txt": b"x" * 1001, "nul.txt": b"a\x00b"})
    put(hf, {"tf_model.h5": b"", "runs/1/notes.txt": b"a"})
    assert main(["from-torch", str(hf), str(tmp_path / "ours")]) == 0
    assert checkpoint.read_files(tmp_path / "ours") == TRAVELLERS
    error = capsys.readouterr().err
    for said in (
        "log.txt (1,001 bytes; at most 1,000 travel)",
        "logo.png, nul.txt (not text)",
        "runs (a folder)",
        "tf_model.h5 (weights)",
    ):
        assert f"left behind: {said}\n" in error
    assert "model.safetensors" not in error
    assert main(["from-torch", str(hf), str(tmp_path / "ours"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"files that travel with it: .*LICENSE.*tokenizer\.model", printed)
    assert "left behind: runs (a folder)" in printed


def test_a_tokenizer_never_stays_behind(tmp_path, hf, monkeypatch, capsys):
    monkeypatch.setattr(travelling, "LARGEST_TOKENIZER_FILE", 1000)
    assert_refused(hf, tmp_path / "ours", r"tokenizer\.model: .* 2,304 bytes; at most 1,000 travel", capsys)
    (hf / "tokenizer.model").rename(hf / "topics.model")  # whatever that is
    assert main(["from-torch", str(hf), str(tmp_path / "ours")]) == 0
    assert "left behind: topics.model (2,304 bytes" in capsys.readouterr().err


def test_links_are_followed_where_the_hub_puts_them_and_nowhere_else(tmp_path, hf, capsys):
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    snapshot.parent.mkdir()
    hf.rename(snapshot)
    for number, name in enumerate(
        ["README.md", "tokenizer.json", "model.safetensors", "additional_chat_templates/tools.jinja"]
    ):
        (snapshot / name).rename(cache / "blobs" / str(number))
        (snapshot / name).symlink_to(cache / "blobs" / str(number))
    (tmp_path / "secret").write_text("mine")
    (snapshot / "note.txt").symlink_to(tmp_path / "secret")
    (snapshot / "COPYING").symlink_to("LICENSE")
    (snapshot / "gone.txt").symlink_to("nowhere")
    assert main(["from-torch", str(snapshot), str(tmp_path / "ours")]) == 0
    assert checkpoint.read_files(tmp_path / "ours") == {**TRAVELLERS, "COPYING": TRAVELLERS["LICENSE"]}
    error = capsys.readouterr().err
    assert f"left behind: note.txt (a link out of the folder, to {tmp_path / 'secret'})\n" in error
    assert "left behind: gone.txt (not a file)\n" in error
    (snapshot / "vocab.json").unlink()
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret")
    assert_refused(
        snapshot, tmp_path / "another", "vocab.json: a file of the tokenizer.*a link out of the folder", capsys
    )


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a/b/c", "", ".", "a\\b", "a//b"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, hf, capsys, name):
    ours = tmp_path / "ours"
    assert main(["from-torch", str(hf), str(ours)]) == 0
    (ours / "tokenizer" / "metadata").write_text(json.dumps({name: "x"}))
    reseal(ours)
    assert_refused(ours, tmp_path / "back", "leads out of the folder; refusing", capsys, "to-torch")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_are_made_anew_are_not_overwritten(tmp_path, hf, capsys, name):
    ours = tmp_path / "ours"
    assert main(["from-torch", str(hf), str(ours)]) == 0
    (ours / "tokenizer" / "metadata").write_text(json.dumps({name: "x"}))
    reseal(ours)
    assert_refused(ours, tmp_path / "back", f"it carries a file {name}, which is made anew", capsys, "to-torch")


def test_damaged_files_are_named(tmp_path, hf, capsys):
    ours = tmp_path / "ours"
    assert main(["from-torch", str(hf), str(ours)]) == 0
    for value in ({"base64": "!"}, {"hex": "00"}, 7, "\ud83d"):
        (ours / "tokenizer" / "metadata").write_text(json.dumps({"a.txt": value}))
        reseal(ours)
        assert_refused(ours, tmp_path / "back", "the content of a.txt is damaged", capsys, "to-torch")


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu"])
def test_the_config_names_the_activation_as_it_came(tmp_path, hf, name):
    values = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**values, "activation_function": name}))
    assert main(["from-torch", str(hf), str(tmp_path / "ours")]) == 0
    assert main(["to-torch", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["activation_function"] == name


def test_a_checkpoint_of_before_is_read(tmp_path, hf):
    """Made by the code before other files than a tokenizer's travelled: text alone, and no digest but that of
    tokenizer.json."""
    ours = tmp_path / "ours"
    assert main(["from-torch", str(hf), str(ours)]) == 0
    metadata = checkpoint.read_metadata(ours)
    (ours / "tokenizer" / "metadata").write_text(json.dumps({"vocab.json": "{}", "merges.txt": "ä\n"}))
    old = dataclasses.replace(metadata, tokenizer_sha256=None).to_json()
    (ours / "metadata" / "metadata").write_text(json.dumps(old))
    as_format_1(ours)
    assert checkpoint.read_files(ours) == {"vocab.json": b"{}", "merges.txt": "ä\n".encode()}
    assert main(["to-torch", str(ours), str(tmp_path / "back")]) == 0


def test_a_changed_traveller_is_another_conversion(tmp_path, hf, monkeypatch, capsys):
    from test_interrupted_conversion import interrupt_after

    with monkeypatch.context() as patched:
        interrupt_after(3, patched, OSError(28, "No space left on device"))
        assert main(["from-torch", str(hf), str(tmp_path / "ours")]) == 2
    (hf / "README.md").write_text("another")
    assert main(["from-torch", str(hf), str(tmp_path / "ours"), "--resume"]) == 2
    assert "config and tokenizer" in " ".join(capsys.readouterr().err.split())
    (hf / "README.md").write_bytes(TRAVELLERS["README.md"])
    assert main(["from-torch", str(hf), str(tmp_path / "ours"), "--resume"]) == 0
    assert checkpoint.read_files(tmp_path / "ours") == TRAVELLERS
