"""Which weights of a folder are the model: several that could be, tied tensors under either name, names of
wrapped modules."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_convert import assert_refused, make_model, rewrite, save_bin

from aurora_jax.checkpoints.arrays import restore_parameters
from convert.__main__ import main

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

INDEX = "model.safetensors.index.json"


def other_model(kind: str = "multi-query") -> torch.nn.Module:
    model = make_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    return model


def assert_is(ours: Path, model: torch.nn.Module) -> None:
    """All of a checkpoint equals a model, by way of an export that transformers loads."""
    back = ours.with_name(f"{ours.name}-back")
    assert main(["to-torch", str(ours), str(back)]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back, dtype="auto").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.fixture
def both(tmp_path) -> Path:
    """A folder with shards of one model, and another model as a single file."""
    make_model().save_pretrained(tmp_path / "hf", max_shard_size="9KB")
    other_model().save_pretrained(tmp_path / "single")
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "hf" / "model.safetensors")
    return tmp_path / "hf"


def test_a_single_file_beside_an_index_is_refused_until_one_is_chosen(tmp_path, both, capsys):
    said = rf"hf has the weights {INDEX}, model\.safetensors: which of them is the model\? .*--weights {INDEX}"
    assert_refused(both, tmp_path / "ours", said, capsys)
    assert main(["from-torch", str(both), str(tmp_path / "ours"), "--dry-run"]) == 2
    for number, (weights, model) in enumerate({"model.safetensors": other_model(), INDEX: make_model()}.items()):
        assert main(["from-torch", str(both), str(tmp_path / f"ours{number}"), "--weights", weights]) == 0
        assert_is(tmp_path / f"ours{number}", model)


def test_verify_compares_the_weights_that_are_chosen(tmp_path, both, capsys):
    assert main(["from-torch", str(both), str(tmp_path / "ours"), "--weights", INDEX]) == 0
    assert main(["verify", str(both), str(tmp_path / "ours")]) == 2
    assert "which of them is the model" in " ".join(capsys.readouterr().err.split())
    assert main(["verify", str(both), str(tmp_path / "ours"), "--weights-a", INDEX]) == 0
    assert main(["verify", str(tmp_path / "ours"), str(both), "--weights-b", "model.safetensors"]) == 1
    assert main(["verify", str(tmp_path / "ours"), str(both), "--weights-a", INDEX, "--weights-b", INDEX]) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.fp16.safetensors", r"model\.fp16\.safetensors, model\.safetensors"),
        ("model-00002-of-00002.safetensors", r"model-00002-of-00002\.safetensors, model\.safetensors"),
        ("adapter_model.safetensors", r"adapter_model\.safetensors, model\.safetensors"),
        ("consolidated.safetensors", r"consolidated\.safetensors, model\.safetensors"),
    ],
)
def test_other_safetensors_are_not_passed_over(tmp_path, capsys, name, said):
    make_model().save_pretrained(tmp_path / "hf")
    safetensors_torch.save_file({"x": torch.ones(1)}, tmp_path / "hf" / name)
    assert_refused(tmp_path / "hf", tmp_path / "ours", f"{said}: which of them", capsys)
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours"), "--weights", "model.safetensors"]) == 0


def test_a_shard_that_no_index_names_and_a_second_index_are_refused(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "hf", max_shard_size="9KB")
    stray = tmp_path / "hf" / "model-00009-of-00009.safetensors"
    safetensors_torch.save_file({"x": torch.ones(1)}, stray)
    assert_refused(tmp_path / "hf", tmp_path / "ours", rf"{INDEX}, {stray.name}", capsys)
    stray.unlink()
    variant = tmp_path / "hf" / "model.safetensors.index.fp16.json"
    variant.write_text((tmp_path / "hf" / INDEX).read_text())
    assert_refused(tmp_path / "hf", tmp_path / "ours", rf"{variant.name}, {INDEX}", capsys)


def test_a_lone_variant_is_named(tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "model.fp16.safetensors")
    assert_refused(tmp_path / "hf", tmp_path / "ours", r"--weights model\.fp16\.safetensors", capsys)
    assert (
        main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours"), "--weights", "model.fp16.safetensors"]) == 0
    )


def test_safetensors_come_before_bin_as_in_transformers_and_it_is_said(tmp_path, capsys):
    save_bin(other_model(), tmp_path / "hf", shards=1)
    make_model().save_pretrained(tmp_path / "hf")
    torch.save({}, tmp_path / "hf" / "training_args.bin")  # no weights
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "weights: model.safetensors; not read: pytorch_model.bin (--weights pytorch_model.bin takes that)" in said
    assert_is(tmp_path / "ours", transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"))
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "bin"), "--weights", "pytorch_model.bin"]) == 0
    assert_is(tmp_path / "bin", other_model())


def test_a_folder_may_choose_itself(tmp_path, both, capsys):
    """By a key of config.json that `transformers` obeys too, and that an export, whose files are others, does
    not have."""
    values = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps({**values, "transformers_weights": INDEX}))
    assert main(["from-torch", str(both), str(tmp_path / "ours")]) == 0
    assert_is(tmp_path / "ours", transformers.AutoModelForCausalLM.from_pretrained(both))
    (both / "config.json").write_text(json.dumps({**values, "transformers_weights": "../x.safetensors"}))
    assert_refused(both, tmp_path / "another", r"weights \.\./x\.safetensors: no such file", capsys)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("../hf/model.safetensors", "no such file"),
        ("none.safetensors", "no such file.*found config.json"),
        ("config.json", r"\.safetensors or \.bin file or the index"),
    ],
)
def test_a_choice_that_is_none(tmp_path, capsys, weights, said):
    make_model().save_pretrained(tmp_path / "hf")
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours"), "--weights", weights]) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("kind", ["multi-query", "bloom"])
@pytest.mark.parametrize("name", ["head", "embedding"])
def test_tied_tensors_are_read_under_either_name(tmp_path, kind, name):
    """`safetensors.torch.save_model` keeps one name of a shared tensor, and which one is up to it."""
    model = make_model(kind)
    model.config.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    safetensors_torch.save_model(model, str(file))
    embedding = "transformer.word_embeddings.weight" if kind == "bloom" else "transformer.wte.weight"
    assert {"lm_head.weight", embedding} & {*safetensors_torch.load_file(file)} == {"lm_head.weight"}
    if name == "embedding":
        rewrite(file, lambda tensors: tensors.update({embedding: tensors.pop("lm_head.weight")}))
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert_is(tmp_path / "ours", model)


@pytest.mark.parametrize("kind", ["multi-query", "bloom"])
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["conversion", "dry run"])
def test_tied_tensors_that_differ_are_refused(tmp_path, capsys, kind, arguments):
    model = make_model(kind)
    model.save_pretrained(tmp_path / "hf")
    head = model.get_input_embeddings().weight.detach() + 1
    rewrite(tmp_path / "hf" / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": head}))
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours"), *arguments]) == 2
    assert "lm_head.weight differs from" in " ".join(capsys.readouterr().err.split())
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "hf")]) == 2


class Model(torch.nn.Module):
    """What a training framework wraps around a model: its tensors are then named `model.`..."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model


WRAPPED = {
    "torch.compile": torch.compile,
    "data parallel": torch.nn.DataParallel,  # names as DistributedDataParallel does
    "compiled and data parallel": lambda model: torch.nn.DataParallel(torch.compile(model)),
    "data parallel and compiled": lambda model: torch.compile(torch.nn.DataParallel(model)),
    "framework": Model,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("kind", ["multi-query", "bloom"])
def test_names_of_wrapped_models_are_understood(tmp_path, wrapper, kind):
    model = make_model(kind)
    model.config.save_pretrained(tmp_path / "hf")
    state = WRAPPED[wrapper](model).state_dict()
    assert not any(name.startswith(("transformer.", "lm_head.")) for name in state)
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert_is(tmp_path / "ours", model)


def test_compiled_layers_buffers_and_shards_of_wrapped_models(tmp_path):
    """A model whose layers were compiled one by one, with the old mask buffers, in shards with an index."""
    model = make_model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for number, layer in enumerate(model.transformer.h):
        model.transformer.h[number] = torch.compile(layer)
    wrapped = torch.nn.DataParallel(model)
    state = {**wrapped.state_dict(), "module.transformer.h.0._orig_mod.attn.bias": torch.ones(33, 33, dtype=torch.bool)}
    assert any("._orig_mod." in name for name in state)
    (tmp_path / "hf").mkdir()
    model.config.save_pretrained(tmp_path / "hf")
    names = list(state)
    weight_map = {}
    for number in range(3):
        file = f"pytorch_model-{number + 1:05d}-of-00003.bin"
        torch.save({name: state[name] for name in names[number::3]}, tmp_path / "hf" / file)
        weight_map |= dict.fromkeys(names[number::3], file)
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0
    assert main(["to-torch", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert main(["verify", str(tmp_path / "hf"), str(tmp_path / "ours")]) == 0


UP = "transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: {f"_orig_mod.{UP}": t.pop(UP), **t},
            rf"_orig_mod\.{UP} has the prefix '_orig_mod' of torch\.compile, but .* has none",
        ),
        (
            lambda t: {f"transformer._orig_mod.{UP[12:]}": t[UP] + 1, **t},
            f"{UP} and .*_orig_mod.* are both|_orig_mod.* and .* are both",
        ),
        (
            lambda t: {f"gpt.{name}": value for name, value in t.items()},
            r"gpt\.transformer\.wte\.weight, whose prefix is unknown",
        ),
    ],
    ids=["some only", "twice", "unknown"],
)
def test_names_that_cannot_be_told_apart_are_named(tmp_path, capsys, change, said):
    make_model().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    safetensors_torch.save_file(change(safetensors_torch.load_file(file)), file, metadata={"format": "pt"})
    assert_refused(tmp_path / "hf", tmp_path / "ours", said, capsys)


def test_the_embedding_is_the_head_bit_for_bit(tmp_path):
    """Of a file that has the head alone, in half the precision, padded to what a mesh divides."""
    model = make_model(dtype=torch.bfloat16)
    model.config.save_pretrained(tmp_path / "hf")
    safetensors_torch.save_model(model, str(tmp_path / "hf" / "model.safetensors"))
    assert main(["from-torch", str(tmp_path / "hf"), str(tmp_path / "ours"), "--vocabulary-divisible-by", "8"]) == 0
    embedding = np.asarray(restore_parameters(tmp_path / "ours", dtype="float32")["token_embedding"]["embedding"])
    np.testing.assert_array_equal(embedding[:97], model.lm_head.weight.detach().float().numpy())
    assert not embedding[97:].any()
