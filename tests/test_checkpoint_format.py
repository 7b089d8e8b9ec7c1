"""The checkpoint format: what is saved comes back, plain Orbax reads it, and what does not fit is refused by name."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from resealing import resealed

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.arrays import open_parameters, restore_parameters
from aurora_jax.checkpoints.metadata import CheckpointMetadata, require_same_architecture
from aurora_jax.checkpoints.writing import save_args, save_checkpoint, sealed, write_checkpoint
from aurora_jax.errors import Damaged, InputError
from aurora_jax.model.config import ModelConfig, to_hf_config
from aurora_jax.model.decoder import initial_parameters
from aurora_jax.model.sharding import flatten, nest
from aurora_jax.storage.carried_files import write_files
from aurora_jax.train.config import DataConfig, TrainConfig
from aurora_jax.train.loop import train
from aurora_jax.train.stages import LearningRate, Stage

CONFIG = ModelConfig(vocabulary_size=49, max_positions=17, width=12, layers=2, heads=3, mlp_width=20)


@pytest.fixture(scope="module")
def parameters() -> dict:
    return initial_parameters(CONFIG, seed=0)


@pytest.fixture
def metadata() -> CheckpointMetadata:
    return CheckpointMetadata(
        config=CONFIG,
        parameter_dtype="float32",
        hf_config={**to_hf_config(CONFIG), "a_key_of_somebody_else": [1, 2]},
        tokenizer_sha256="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",  # of {}
        source={"path": "/somewhere", "files": {"model.safetensors": 12}},
        step=7,
        stage="cap",
        data_fingerprints={"fi": "abc"},
        lineage=[{"stage": "base", "steps": 3}],
    )


def assert_equal_trees(a: dict, b: dict) -> None:
    assert {*flatten(a)} == {*flatten(b)}
    for path, leaf in flatten(a).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(flatten(b)[path]), err_msg=path)


def save_step(run: Path, step: int, parameters: dict, metadata: CheckpointMetadata) -> None:
    """As a training run saves."""
    with ocp.CheckpointManager(run / "checkpoints") as manager:
        items = {
            "params": ocp.args.StandardSave(parameters, save_args(parameters)),
            "optimizer": ocp.args.StandardSave({"mu": parameters}),
            "tokenizer": ocp.args.JsonSave({"tokenizer.json": "{}"}),
        }
        arrays = {"params": parameters, "optimizer": {"mu": parameters}}
        metadata = sealed(dataclasses.replace(metadata, step=step), arrays, {"tokenizer": {"tokenizer.json": "{}"}})
        items["metadata"] = ocp.args.JsonSave(metadata.to_json())
        manager.save(step, args=ocp.args.Composite(**items))


def test_everything_comes_back(tmp_path, parameters, metadata):
    files = {
        "tokenizer.json": '{"a": "ä\\n"}\r\n'.encode(),
        "LICENSE": b"",
        "tokenizer.model": bytes(range(256)),
        "additional_chat_templates/a.jinja": b"\x00{{ a }}",
    }
    save_checkpoint(tmp_path / "c", parameters, metadata, files)
    assert checkpoint.is_checkpoint(tmp_path / "c")
    assert checkpoint.read_metadata(tmp_path / "c") == metadata
    assert checkpoint.read_files(tmp_path / "c") == files
    write_files(files, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    restored = restore_parameters(tmp_path / "c")
    assert all(isinstance(leaf, jax.Array) for leaf in flatten(restored).values())
    assert_equal_trees(restored, parameters)


def test_plain_orbax_reads_it(tmp_path, parameters, metadata):
    save_checkpoint(tmp_path / "c", parameters, metadata)
    assert_equal_trees(ocp.StandardCheckpointer().restore(tmp_path / "c" / "params"), parameters)
    assert_equal_trees(ocp.PyTreeCheckpointer().restore(tmp_path / "c" / "params"), parameters)


def test_bfloat16_is_rounded_once(tmp_path, parameters, metadata):
    save_checkpoint(tmp_path / "c", parameters, metadata)
    restored = restore_parameters(tmp_path / "c", dtype="bfloat16")
    assert_equal_trees(restored, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters))


def test_restores_into_the_given_shardings(tmp_path, parameters, metadata):
    save_checkpoint(tmp_path / "c", parameters, metadata)
    mesh = jax.make_mesh((1,), ("fsdp",))
    shardings = jax.tree.map(lambda _: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), parameters)
    restored = restore_parameters(tmp_path / "c", shardings=shardings)
    assert all(isinstance(leaf.sharding, jax.sharding.NamedSharding) for leaf in flatten(restored).values())
    assert_equal_trees(restored, parameters)


@pytest.mark.parametrize("written_by", ["save_checkpoint", "training"])
def test_slices_are_readable_alone(tmp_path, parameters, metadata, written_by):
    if written_by == "training":
        save_step(tmp_path, 3, parameters, metadata)
    else:
        save_checkpoint(tmp_path / "checkpoints" / "3", parameters, metadata)
    stores = open_parameters(tmp_path)
    for path, leaf in flatten(parameters).items():
        np.testing.assert_array_equal(stores[path][1].read().result(), np.asarray(leaf)[1])
        if path.startswith("layers."):
            assert stores[path].chunk_layout.read_chunk.shape[0] == 1, "a chunk must not span layers"


def test_resolve_takes_the_newest_complete_step(tmp_path, parameters, metadata):
    for step in (2, 10):
        save_step(tmp_path, step, parameters, metadata)
    (tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "12" / "params").mkdir(parents=True)  # a step whose writing was cut off
    assert checkpoint.resolve(tmp_path).name == "10"
    assert checkpoint.read_metadata(tmp_path).step == 10
    assert checkpoint.resolve(tmp_path / "checkpoints" / "2").name == "2"
    assert_equal_trees(restore_parameters(tmp_path), parameters)


def test_resolve_lists_what_was_found(tmp_path, parameters, metadata):
    save_checkpoint(tmp_path / "stages" / "cap", parameters, metadata)
    assert checkpoint.resolve(tmp_path / "stages" / "cap").name == "cap"
    with pytest.raises(InputError, match="stages/cap"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        checkpoint.resolve(tmp_path / "nowhere")


def test_an_existing_destination_is_left_alone(tmp_path, parameters, metadata):
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="exists already"):
        save_checkpoint(tmp_path / "c", parameters, metadata)
    assert not list((tmp_path / "c").iterdir())


def test_an_unwritable_destination_is_named(tmp_path, parameters, metadata):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/c cannot be written"):
        save_checkpoint(tmp_path / "file" / "c", parameters, metadata)


def test_parameters_must_fit_the_metadata(tmp_path, parameters, metadata):
    wider = dataclasses.replace(metadata, config=dataclasses.replace(CONFIG, mlp_width=21), hf_config=None)
    with pytest.raises(InputError, match=r"mlp\.up\.kernel.*\(2, 12, 20\).*\(2, 12, 21\)"):
        save_checkpoint(tmp_path / "c", parameters, wider)
    with pytest.raises(InputError, match=r"float32.*bfloat16"):
        save_checkpoint(tmp_path / "c", parameters, dataclasses.replace(metadata, parameter_dtype="bfloat16"))
    assert not list(tmp_path.iterdir())


def test_stored_parameters_that_disagree_with_the_metadata_are_refused(tmp_path, parameters, metadata):
    flat = flatten(parameters)
    del flat["final_norm.bias"]
    handler = ocp.StandardCheckpointHandler()
    metadata = sealed(metadata, {"params": nest(flat)}, {})
    write_checkpoint(tmp_path / "c", handler, ocp.args.StandardSave(nest(flat)), metadata, {})
    with pytest.raises(InputError, match=r"final_norm\.bias"):
        restore_parameters(tmp_path / "c")


def test_damage_is_named(tmp_path, parameters, metadata):
    save_checkpoint(tmp_path / "c", parameters, metadata)
    (tmp_path / "c" / "params" / "manifest.ocdbt").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"c/params.*damaged"):
        restore_parameters(tmp_path / "c")


def test_chunks_of_zeros_are_stored_and_a_missing_one_is_named(tmp_path, parameters, metadata):
    """Zeros are what TensorStore's default would read in its place. In Orbax's database and, as conversions
    write them, in files."""
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    tmp_path = tmp_path / "a %41 ä"
    save_checkpoint(tmp_path / "c", zeros, metadata)
    assert_equal_trees(restore_parameters(tmp_path / "c"), zeros)
    assert_equal_trees(
        nest({name: store.read().result() for name, store in open_parameters(tmp_path / "c").items()}), zeros
    )
    database = ts.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/c/params/"}}
    ).result()
    chunk = "layers.mlp.up.bias/1.0"
    assert database.read(chunk).result().state == "value"
    database.write(chunk, None).result()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    metadata = sealed(metadata, {"params": zeros}, {})
    write_checkpoint(tmp_path / "d", handler, ocp.args.PyTreeSave(zeros, save_args(zeros)), metadata, {})
    assert_equal_trees(restore_parameters(tmp_path / "d"), zeros)
    (tmp_path / "d" / "params" / chunk).unlink()
    for path in (tmp_path / "c", tmp_path / "d"):
        for read in (restore_parameters, open_parameters):
            with pytest.raises(
                InputError,
                match=rf"{re.escape(str(path))}/params: .*damaged or incomplete: the chunk {chunk} is missing",
            ):
                read(path)


@pytest.mark.parametrize("name", ["a[b", "a*b?", "a{b}", "å b", "%41#&'"])
def test_a_checkpoint_in_a_folder_of_any_name_comes_back(tmp_path, name, parameters, metadata):
    save_checkpoint(tmp_path / name / "c", parameters, metadata)
    assert_equal_trees(restore_parameters(tmp_path / name / "c"), parameters)


@pytest.mark.parametrize("name", ["a[b]", "[!x]1"])
def test_a_folder_name_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name, parameters, metadata):
    with pytest.raises(InputError, match=r"choose one without \[ \]"):
        save_checkpoint(tmp_path / name / "c", parameters, metadata)
    with pytest.raises(InputError, match=r"choose one without \[ \]"):
        train(
            TrainConfig(
                tmp_path / name, (Stage("s", "m", 1, LearningRate(1e-3)),), DataConfig("corpus"), model=metadata.config
            )
        )
    assert not (tmp_path / name).exists()


def test_what_orbax_says_of_an_array_that_is_cut_short_has_a_name(tmp_path):
    """One array alone: Orbax leaves the reads of others running, and their errors to the interpreter."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "c", args=ocp.args.PyTreeSave({"a": jnp.ones(100)}))
    (file,) = (tmp_path / "c" / "a").glob("[0-9]*")
    file.write_bytes(file.read_bytes()[:-1])
    with (
        pytest.raises(InputError, match=rf"{tmp_path}: the checkpoint is damaged or incomplete: .*{file}"),
        checkpoint.damage_named(tmp_path),
        ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer,
    ):
        checkpointer.restore(
            tmp_path / "c", args=ocp.args.StandardRestore({"a": jax.ShapeDtypeStruct((100,), jnp.float32)})
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format 3"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"step": "7"}, "step is '7'"),
        ({"step": True}, "step is True"),
        ({"layer_stacking": "unrolled"}, "unrolled"),
        ({"config": None}, "config"),
        ({"config": {**dataclasses.asdict(CONFIG), "activation": "relu"}}, "activation is 'relu'"),
        ({"config": {**dataclasses.asdict(CONFIG), "heads": 4}}, "heads = 4.*heads = 3"),
    ],
)
def test_bad_metadata_is_refused(metadata, change, message):
    assert CheckpointMetadata.from_json(metadata.to_json()) == metadata
    with pytest.raises(InputError, match=message):
        CheckpointMetadata.from_json(resealed({**metadata.to_json(), **change}))
    with pytest.raises(Damaged, match="not what was written"):
        CheckpointMetadata.from_json({**metadata.to_json(), **change})


def test_missing_metadata_keys_are_named(metadata):
    values = metadata.to_json()
    del values["parameter_dtype"]
    with pytest.raises(InputError, match="parameter_dtype"):
        CheckpointMetadata.from_json(resealed(values))


@pytest.fixture
def of_before(metadata) -> dict:
    """Metadata as versions until 2026-11-25 wrote them."""
    values = dataclasses.replace(metadata, format_version=1).to_json()
    return {name: value for name, value in values.items() if name not in ("sha256", "contents", "made_with")}


def test_metadata_from_before_there_was_bloom_is_read(metadata, of_before):
    values, metadata = of_before, dataclasses.replace(metadata, format_version=1)
    assert values["config"].pop("positions") == "learned"
    assert values["config"].pop("embedding_norm") is False
    assert CheckpointMetadata.from_json(values) == metadata


def test_metadata_from_before_there_was_padding_is_read(metadata, of_before):
    values, metadata = of_before, dataclasses.replace(metadata, format_version=1)
    assert values["config"].pop("vocabulary_divisible_by") == 1
    assert CheckpointMetadata.from_json(values) == metadata


def test_a_padded_vocabulary_fits_its_hf_config(metadata):
    padded = dataclasses.replace(metadata, config=dataclasses.replace(CONFIG, vocabulary_divisible_by=8))
    assert CheckpointMetadata.from_json(padded.to_json()) == padded


def test_the_length_of_training_is_part_of_the_architecture_where_positions_are_learned():
    longer = dataclasses.replace(CONFIG, max_positions=18)
    with pytest.raises(InputError, match=r"max_positions = 17.*max_positions = 18"):
        require_same_architecture(CONFIG, longer, "a", "b")
    alibi, longer = (dataclasses.replace(config, positions="alibi") for config in (CONFIG, longer))
    require_same_architecture(alibi, longer, "a", "b")
    with pytest.raises(InputError, match=r"positions = 'learned'.*positions = 'alibi'"):
        require_same_architecture(CONFIG, alibi, "a", "b")


def test_dropout_is_not_part_of_the_architecture():
    require_same_architecture(CONFIG, CONFIG.with_dropout(0.0), "a", "b")
    with pytest.raises(InputError, match="a has layers = 2, but b has layers = 3"):
        require_same_architecture(CONFIG, dataclasses.replace(CONFIG, layers=3), "a", "b")
