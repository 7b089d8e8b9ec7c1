"""PyTorch weights in and out, against transformers and the safetensors library; bad input of every kind
leaves nothing behind."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.arrays import restore_parameters, stored_arrays
from aurora_jax.model.sharding import flatten
from convert import weight_map
from convert.__main__ import main
from convert.source import read_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 97,
    "n_positions": 33,
    "n_embd": 20,
    "n_layer": 2,
    "n_head": 5,
    "n_inner": 51,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BLOOM_SIZES = {
    "vocab_size": 97,
    "hidden_size": 20,
    "n_layer": 2,
    "n_head": 5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
TOKENIZER = {"tokenizer.json": '{"ä": 1}\n', "merges.txt": "a b\n"}


def make_model(kind: str = "multi-query", dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A GPTBigCode or BLOOM of odd sizes with random numbers in every weight, biases and LayerNorms included."""
    if kind == "bloom":
        model = transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM_SIZES)).eval()
    else:
        config = transformers.GPTBigCodeConfig(**SIZES, multi_query=kind == "multi-query")
        model = transformers.GPTBigCodeForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.to(dtype)


def save_bin(model: torch.nn.Module, folder: Path, shards: int) -> None:
    """As older versions of transformers saved: with the tied head, if there is one, and the causal-mask buffers."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = dict(model.state_dict())
    prefix = "transformer." if "lm_head.weight" in state else ""
    state[f"{prefix}h.0.attn.bias"] = torch.ones(33, 33, dtype=torch.bool)
    state[f"{prefix}h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weights: dict[str, str] = {}
    names = list(state)
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: state[name] for name in names[number::shards]}, folder / file)
        weights |= dict.fromkeys(names[number::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weights}))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A folder with several safetensors shards."""
    make_model().save_pretrained(tmp_path / "hf", max_shard_size="9KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    return tmp_path / "hf"


@pytest.fixture
def single(tmp_path) -> Path:
    make_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["multi-query", "multi-head", "bloom"])
@pytest.mark.parametrize("layout", ["single", "sharded", "bin", "sharded-bin", "headless", "headless-bin"])
def test_round_trip_is_bit_exact(tmp_path, monkeypatch, kind, dtype, layout):
    monkeypatch.setattr(weight_map, "CHUNK_BYTES", 500)  # so that these small tensors too take many blocks
    model = make_model(kind, dtype)
    source, ours, back = tmp_path / "hf", tmp_path / "ours", tmp_path / "back"
    saved = model.transformer if layout.startswith("headless") else model  # without a head, names have no prefix
    if layout.endswith("bin"):
        save_bin(saved, source, shards=3 if layout == "sharded-bin" else 1)
    else:
        saved.save_pretrained(source, max_shard_size="9KB" if layout == "sharded" else "5GB")
    for name, text in TOKENIZER.items():
        (source / name).write_text(text, encoding="utf-8")

    assert main(["from-torch", str(source), str(ours)]) == 0
    assert main(["to-torch", str(ours), str(back), "--max-shard-size", "9KB" if "sharded" in layout else "5GB"]) == 0

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(back, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == dtype
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    tokens = torch.arange(30)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(tokens).logits, model(tokens).logits)
    for name, text in TOKENIZER.items():
        assert (back / name).read_text(encoding="utf-8") == text
    assert ("model.safetensors.index.json" in os.listdir(back)) == ("sharded" in layout)


def test_exported_files_satisfy_the_safetensors_library(tmp_path, sharded):
    assert main(["from-torch", str(sharded), str(tmp_path / "ours")]) == 0
    assert main(["to-torch", str(tmp_path / "ours"), str(tmp_path / "back"), "--max-shard-size", "9KB"]) == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    seen = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        with safetensors_torch.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                seen[name] = opened.get_tensor(name)
                assert index["weight_map"][name] == file.name
        assert (
            sum(tensor.nbytes for tensor in safetensors_torch.load_file(file).values()) <= 9000
            or len(read_safetensors(file)) == 1
        )
    assert {*seen} == {*index["weight_map"]} == {name for name, _ in make_model().named_parameters()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in seen.values())


def test_reader_agrees_with_the_safetensors_library(single):
    file = single / "model.safetensors"
    expected = safetensors_torch.load_file(file)
    tensors = read_safetensors(file)
    assert {*tensors} == {*expected}
    for name, stored in tensors.items():
        np.testing.assert_array_equal(
            stored.read_rows([(1, stored.shape[0])]), expected[name].numpy()[1:], err_msg=name
        )


def test_checkpoint_describes_itself_and_plain_orbax_reads_it(tmp_path, single):
    for name, text in TOKENIZER.items():
        (single / name).write_text(text, encoding="utf-8")
    assert main(["from-torch", str(single), str(tmp_path / "ours")]) == 0
    metadata = checkpoint.read_metadata(tmp_path / "ours")
    assert metadata.hf_config == json.loads((single / "config.json").read_text())
    assert metadata.parameter_dtype == "float32"
    assert metadata.source["files"] == {"model.safetensors": (single / "model.safetensors").stat().st_size}
    read = checkpoint.read_files(tmp_path / "ours")
    assert {name: read[name].decode() for name in TOKENIZER} == TOKENIZER
    restored = flatten(restore_parameters(tmp_path / "ours"))
    for checkpointer in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
        for path, leaf in flatten(checkpointer.restore(tmp_path / "ours" / "params")).items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(restored[path]), err_msg=path)


def test_dtype_on_the_way_in_and_out(tmp_path, single):
    assert main(["from-torch", str(single), str(tmp_path / "ours"), "--dtype", "bfloat16"]) == 0
    assert {str(leaf.dtype) for leaf in stored_arrays(tmp_path / "ours").values()} == {"bfloat16"}
    assert main(["to-torch", str(tmp_path / "ours"), str(tmp_path / "back"), "--dtype", "float32"]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert loaded.dtype == torch.float32
    for name, value in make_model().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float()), name


def test_float16_becomes_float32_exactly(tmp_path):
    model = make_model(dtype=torch.float16)
    model.save_pretrained(tmp_path / "hf")
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    embedding = restore_parameters(tmp_path / "ours")["token_embedding"]["embedding"]
    np.testing.assert_array_equal(np.asarray(embedding), model.transformer.wte.weight.detach().float().numpy())


def test_dry_run_prints_the_mapping_and_writes_nothing(tmp_path, single, capsys):
    assert main(["from-torch", str(single), str(tmp_path / "ours"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for name, parameter in make_model().named_parameters():
        line = next(line for line in printed.splitlines() if f" {name} " in line)
        assert str(list(parameter.shape)) in line
    assert "layers.attention.query.kernel[1]" in printed
    assert "(None, ('fsdp', 'fsdp_inner'), 'tensor', None)" in printed
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize(("kind", "up"), [("multi-query", "mlp.c_fc"), ("bloom", "mlp.dense_h_to_4h")])
def test_verify_says_whether_models_agree(tmp_path, capsys, kind, up):
    model, single = make_model(kind), tmp_path / "hf"
    model.save_pretrained(single)
    assert main(["from-torch", str(single), str(tmp_path / "ours")]) == 0
    assert main(["verify", str(single), str(tmp_path / "ours")]) == 0
    assert "random, seed 0" in capsys.readouterr().out
    with torch.no_grad():
        model.get_parameter(f"transformer.h.1.{up}.bias")[3] += 1.0
    model.save_pretrained(tmp_path / "changed")
    assert main(["verify", str(single), str(tmp_path / "changed")]) == 1
    assert main(["verify", str(tmp_path / "ours"), str(tmp_path / "changed"), "--max-kl", "1e9"]) == 0
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 5] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    assert main(["verify", str(single), str(tmp_path / "nan"), "--max-kl", "1e9"]) == 1


def test_verify_reads_text_with_the_tokenizer_of_either(tmp_path, single, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({chr(97 + letter): letter for letter in range(26)} | {"?": 26}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(single / "tokenizer.json"))
    assert main(["from-torch", str(single), str(tmp_path / "ours")]) == 0
    (single / "tokenizer.json").unlink()
    (tmp_path / "text").write_text("hello")
    assert main(["verify", str(single), str(tmp_path / "ours"), "--text", str(tmp_path / "text")]) == 0
    assert "5 (text)" in capsys.readouterr().out


def test_verify_compares_the_tokenizers_of_both(tmp_path, single, capsys):
    """Files that are written otherwise are the same if they read the text alike; other tokens make another model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {chr(97 + letter): letter for letter in range(26)} | {"?": 26}
    assert main(["from-torch", str(single), str(tmp_path / "ours")]) == 0
    assert not checkpoint.read_files(tmp_path / "ours").keys() & {"tokenizer.json"}
    for number, (name, vocab) in enumerate({"a": vocabulary, "b": {**vocabulary, "a": 1, "b": 0}}.items()):
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        shutil.copytree(single, tmp_path / name)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"), pretty=number == 0)
    (tmp_path / "text").write_text("abba")
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "b"), "--text", str(tmp_path / "text")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    digests = [hashlib.sha256((tmp_path / name / "tokenizer.json").read_bytes()).hexdigest()[:12] for name in "ab"]
    assert re.search(
        f"a has the tokenizer {digests[0]}, .*b has {digests[1]}, and they read the text as other tokens", error
    )
    (tmp_path / "text").write_text("xyz")
    assert main(["verify", str(tmp_path / "a"), str(tmp_path / "b"), "--text", str(tmp_path / "text")]) == 0


def test_verify_measures_what_it_says():
    """Against distributions whose divergence is known: KL([1/2, 1/2] || [1/4, 3/4]) = ln 2 - ln 3 / 2."""
    from convert.verify import compare

    a_LV, b_LV = np.log([[0.5, 0.5], [0.2, 0.8]]), np.log([[0.25, 0.75], [0.2, 0.8]])
    agreement = compare(lambda _: a_LV, lambda _: b_LV + 7.0, [np.zeros(2)])
    assert agreement.tokens == 2
    assert agreement.max_kl == pytest.approx(np.log(2) - np.log(3) / 2)
    assert agreement.mean_kl == pytest.approx(agreement.max_kl / 2)
    assert agreement.top1 == 0.5  # a tie of A goes to token 0
    assert agreement.top5 == 1.0
    assert agreement.max_logit_difference == pytest.approx(7 + np.log(1.5))


def rewrite(file: Path, change) -> None:
    """Loads a safetensors file, changes its dictionary of tensors in place, saves it again."""
    tensors = safetensors_torch.load_file(file)
    change(tensors)
    safetensors_torch.save_file(tensors, file, metadata={"format": "pt"})


def rewrite_json(file: Path, change) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def shard_with(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


WTE, UP = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"


def _write_header(file: Path, header: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def _entry(**changes) -> bytes:
    return json.dumps({WTE: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


BAD_SINGLE = {
    "missing tensor": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.pop(UP)),
        f"{UP}.*missing.*model.safetensors",
    ),
    "unexpected tensor": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.update(extra=torch.ones(3))),
        "model.safetensors.*extra",
    ),
    "mis-shaped tensor": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.update({UP: torch.ones(50, 20)})),
        rf"model.safetensors.*{UP}.*\[50, 20\].*\[51, 20\]",
    ),
    "vocabulary differs": (
        lambda f: rewrite_json(f / "config.json", lambda c: c.update(vocab_size=98)),
        r"\[97, 20\].*vocab_size 98",
    ),
    "untied head": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.update({"lm_head.weight": t[WTE] + 1})),
        "lm_head.weight differs",
    ),
    "integer tensor": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.update({UP: t[UP].int()})),
        f"{UP} is I32",
    ),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "model.safetensors.*(truncated)"),
    "truncated in the header": (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors.*truncated"),
    "empty file": (lambda f: os.truncate(f / "model.safetensors", 0), "model.safetensors.*truncated"),
    "trailing bytes": (lambda f: (f / "model.safetensors").open("ab").write(b"x"), "1 bytes follow"),
    "absurd header length": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "header claims"),
    "header not JSON": (lambda f: _write_header(f / "model.safetensors", b"{nonsense"), "header: not JSON"),
    "header a list": (lambda f: _write_header(f / "model.safetensors", b"[1]"), "not a JSON object"),
    "offsets outside": (lambda f: _write_header(f / "model.safetensors", _entry()), f"{WTE} ends at byte"),
    "offsets overlap": (
        lambda f: _write_header(f / "model.safetensors", _entry(data_offsets=[4, 12])),
        f"{WTE} begins at byte 4",
    ),
    "offsets negative": (
        lambda f: _write_header(f / "model.safetensors", _entry(data_offsets=[-8, 0])),
        f"{WTE} is malformed",
    ),
    "offsets reversed": (
        lambda f: _write_header(f / "model.safetensors", _entry(data_offsets=[8, 0])),
        f"{WTE} is malformed",
    ),
    "size and shape differ": (
        lambda f: _write_header(f / "model.safetensors", _entry(shape=[3])),
        f"{WTE} F32.*8 bytes",
    ),
    "entry without dtype": (
        lambda f: _write_header(f / "model.safetensors", json.dumps({WTE: {}}).encode()),
        f"{WTE} is malformed",
    ),
    "another architecture": (
        lambda f: rewrite_json(f / "config.json", lambda c: c.update(model_type="llama")),
        "config.json.*llama",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "config without a size": (
        lambda f: rewrite_json(f / "config.json", lambda c: c.pop("n_layer")),
        "config.json.*n_layer",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights.*found config.json"),
    "no folder": (lambda f: f.rename(f.with_name("elsewhere")), "no such folder"),
    "bin is not a pickle": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "pytorch_model.bin").write_bytes(b"junk")),
        "pytorch_model.bin: not a PyTorch checkpoint",
    ),
    "bin runs code": (
        lambda f: ((f / "model.safetensors").unlink(), torch.save({WTE: print}, f / "pytorch_model.bin")),
        "pytorch_model.bin: not a PyTorch checkpoint of plain weights",
    ),
}

INDEX = "model.safetensors.index.json"
BAD_SHARDED = {
    "missing shard": (lambda f: shard_with(f, UP).unlink(), "missing shard"),
    "index outside": (
        lambda f: rewrite_json(f / INDEX, lambda i: i["weight_map"].update({UP: "../x.safetensors"})),
        f"{UP} points outside",
    ),
    "index absolute": (
        lambda f: rewrite_json(f / INDEX, lambda i: i["weight_map"].update({UP: "/etc/passwd"})),
        f"{UP} points outside",
    ),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "'weight_map'"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "index.json: not JSON"),
    "index lists more": (
        lambda f: rewrite_json(f / INDEX, lambda i: i["weight_map"].update(extra=i["weight_map"][UP])),
        "the tensor extra is not in it",
    ),
    "index lists less": (lambda f: rewrite_json(f / INDEX, lambda i: i["weight_map"].pop(UP)), f"{UP}.*nowhere"),
    "index lists another shard": (
        lambda f: rewrite_json(f / INDEX, lambda i: i["weight_map"].update({UP: i["weight_map"][WTE]})),
        f"{UP}.*do not belong together",
    ),
}


def assert_refused(folder: Path, destination: Path, message: str, capsys, command: str = "from-torch") -> None:
    before = sorted(destination.parent.iterdir())
    assert main([command, str(folder), str(destination)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "error: " in error
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert sorted(destination.parent.iterdir()) == before


@pytest.mark.parametrize("case", BAD_SINGLE)
def test_bad_folder_is_refused(tmp_path, single, capsys, case):
    spoil, message = BAD_SINGLE[case]
    spoil(single)
    assert_refused(single, tmp_path / "ours", message, capsys)


@pytest.mark.parametrize("case", BAD_SHARDED)
def test_bad_shards_are_refused(tmp_path, sharded, capsys, case):
    spoil, message = BAD_SHARDED[case]
    spoil(sharded)
    assert_refused(sharded, tmp_path / "ours", message, capsys)


def test_symbolic_links_of_the_hub_cache_are_followed(tmp_path, single):
    blob = tmp_path / "blob"
    (single / "model.safetensors").rename(blob)
    (single / "model.safetensors").symlink_to(blob)
    assert main(["from-torch", str(single), str(tmp_path / "ours")]) == 0


@pytest.mark.parametrize("command", ["from-torch", "to-torch"])
def test_destinations_that_cannot_be(tmp_path, single, capsys, command):
    source = single
    if command == "to-torch":
        source = tmp_path / "ours"
        assert main(["from-torch", str(single), str(source)]) == 0
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    assert_refused(source, tmp_path / "there", "there exists already", capsys, command)
    assert main([command, str(source), str(tmp_path / "file" / "x")]) == 2
    assert "file/x cannot be written" in " ".join(capsys.readouterr().err.split())


def test_to_torch_refuses_what_is_no_checkpoint(tmp_path, single, capsys):
    assert_refused(single, tmp_path / "back", "Hugging Face folder.*from-torch", capsys, "to-torch")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", tmp_path / "back", "neither a checkpoint", capsys, "to-torch")
    assert main(["from-torch", str(single), str(tmp_path / "ours")]) == 0
    chunk = next((tmp_path / "ours" / "params" / "layers.mlp.up.kernel").glob("1.*"))
    chunk.unlink()
    assert_refused(tmp_path / "ours", tmp_path / "back", "ours.*damaged", capsys, "to-torch")
    assert main(["to-torch", str(tmp_path / "ours"), str(tmp_path / "back"), "--max-shard-size", "much"]) == 2
    assert "'much' is no size" in capsys.readouterr().err


def test_safetensors_need_no_torch(tmp_path, single):
    """Both directions work where neither PyTorch nor transformers is installed."""
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from convert.__main__ import main
source, ours, back = {[str(single), str(tmp_path / "ours"), str(tmp_path / "back")]}
sys.exit(main(["from-torch", source, ours]) or main(["to-torch", ours, back]))
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "back" / "model.safetensors").exists()


def test_bin_without_torch_names_the_extra(tmp_path, monkeypatch, capsys):
    save_bin(make_model(), tmp_path / "hf", shards=1)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_refused(tmp_path / "hf", tmp_path / "ours", r"aurora-jax\[torch\]", capsys)
