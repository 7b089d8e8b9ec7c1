"""Every description in JSON is read through one door: what is wrong is one line with the file and the field."""

import dataclasses
import json

import pytest

from aurora_jax.checkpoints.metadata import CheckpointMetadata
from aurora_jax.data.batches.store import StoreInfo, read_info
from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig
from aurora_jax.sample_corpus.build import CorpusManifest, SourceEntry
from aurora_jax.storage.records import described

CONFIG = ModelConfig(vocabulary_size=49, max_positions=17, width=12, layers=2, heads=3, mlp_width=20)
DESCRIPTIONS = {
    "metadata": CheckpointMetadata(
        dataclasses.replace(CONFIG, eos_token_id=(1, 2)), "float32", lineage=[{"stage": "a"}]
    ),
    "store.json": StoreInfo("fi", "train", "f", "s", "t", 49, None, "fi", 1, 2, 3),
    "manifest.json": CorpusManifest("b", 1, "pypi", "rule", {}, [], {"a": "b"}),
}


def written(name: str, **changed) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(DESCRIPTIONS[name]))) | changed


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_what_was_written_comes_back(name):
    description = DESCRIPTIONS[name]
    assert described(json.dumps(written(name)).encode(), type(description), name) == description
    assert described(written(name), type(description), name) == description


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_what_is_wrong_is_named(name):
    kind = type(DESCRIPTIONS[name])
    hints = {"metadata": "step", "store.json": "tokens", "manifest.json": "version"}
    required = {"metadata": "parameter_dtype", "store.json": "task", "manifest.json": "registry"}
    lacking = written(name)
    del lacking[required[name]]
    for values, message in (
        (written(name, **{hints[name]: "many"}), f"{name}: {hints[name]} is 'many': Expected `int`"),
        (written(name, **{hints[name]: None}), f"{name}: {hints[name]} is None: Expected `int`"),
        (written(name, **{hints[name]: 1.5}), f"{name}: {hints[name]} is 1.5: Expected `int`"),
        (written(name, colour=1), f"{name} has the unknown key 'colour'"),
        (lacking, f"{name}: .*missing required field `{required[name]}`"),
        ([], f"{name}: Expected `object`"),
    ):
        with pytest.raises(InputError, match=message) as error:
            described(json.dumps(values).encode(), kind, name)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=f"{name}: "):
        described(json.dumps(written(name)).encode()[:-1], kind, name)


def test_fields_of_fields_are_checked_too():
    config = written("metadata")["config"]
    for changed, message in (
        ({"layers": "two"}, "config.layers is 'two'"),
        ({"positions": "rotary"}, "config.positions is 'rotary'"),
        ({"eos_token_id": [1, "2"]}, "config.eos_token_id"),
        ({"colour": 1}, "unknown key 'config.colour'"),
    ):
        with pytest.raises(InputError, match=message):
            described(written("metadata", config=config | changed), CheckpointMetadata, "c")
    entry = SourceEntry(
        *[("fi",) if field.name == "languages" else field.name for field in dataclasses.fields(SourceEntry)]
    )
    sources = json.loads(json.dumps([dataclasses.asdict(entry)]))
    with pytest.raises(
        InputError, match=r"manifest\.json: Expected `array`, got `int` - at `\$\.sources\[0\]\.languages`"
    ):
        described(written("manifest.json", sources=[{**sources[0], "languages": 7}]), CorpusManifest, "manifest.json")


def test_a_store_whose_description_is_damaged_says_what_to_do(tmp_path):
    (tmp_path / "store.json").write_text(json.dumps(written("store.json", tokens="2")))
    with pytest.raises(InputError, match=r"tokens is '2': Expected `int`.*delete the folder and build it again"):
        read_info(tmp_path)
