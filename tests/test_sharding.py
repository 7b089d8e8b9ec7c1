"""The shardings of every parameter of StarCoderPlus and of BLOOM 176B, against a file that people have read:
`tests/golden/shardings.json`.

python tests/test_sharding.py      writes the file anew
"""

import itertools
import json
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from aurora_jax.errors import InputError
from aurora_jax.model.config import PRESETS, ModelConfig
from aurora_jax.model.decoder import check_parameters, initial_parameters
from aurora_jax.model.sharding import MESH_AXES, TABLE, flatten, parameter_shapes

GOLDEN = Path(__file__).with_name("golden") / "shardings.json"
MESHES = {"64 x v5p": (1, 4, 16, 1, 1), "256 x v5e": (1, 16, 16, 1, 1), "2 x 128, tensor 4": (2, 8, 4, 1, 4)}


def found() -> dict:
    shardings: dict[str, dict] = {}
    for model, (name, sizes) in itertools.product(("starcoderplus", "bloom"), MESHES.items()):
        mesh = AbstractMesh(sizes, MESH_AXES)
        shardings[f"{model}, {name}"] = {
            path: f"{TABLE[path].letters} {shape.shape} {TABLE[path].partition} "
            f"-> {NamedSharding(mesh, TABLE[path].partition).shard_shape(shape.shape)}"
            for path, shape in parameter_shapes(PRESETS[model]).items()
        }
    return shardings


def test_shardings_are_those_of_the_golden_file():
    assert found() == json.loads(GOLDEN.read_text())


SIZES = {"vocabulary_size": 31, "max_positions": 16, "width": 12, "layers": 2, "heads": 3, "mlp_width": 20}


@pytest.mark.parametrize("positions", ["learned", "alibi"])
@pytest.mark.parametrize("embedding_norm", [False, True])
def test_a_model_has_the_parameters_of_its_config_and_no_others(positions, embedding_norm):
    config = ModelConfig(**SIZES, positions=positions, embedding_norm=embedding_norm)
    parameters = jax.eval_shape(lambda: initial_parameters(config, 0))
    assert {path: array.shape for path, array in flatten(parameters).items()} == {
        path: shape.shape for path, shape in parameter_shapes(config).items()
    }
    check_parameters(config, parameters)
    with pytest.raises(InputError, match="embedding"):
        check_parameters(ModelConfig(**SIZES, positions="alibi" if positions == "learned" else "learned"), parameters)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found(), indent=1) + "\n")
