"""The shardings of every parameter of the 15.5B model, against a file that people have read: `tests/golden/shardings.json`.

python tests/test_sharding.py      writes the file anew
"""

import json
from pathlib import Path

from jax.sharding import AbstractMesh, NamedSharding

from aurora_jax.model.config import PRESETS
from aurora_jax.model.sharding import MESH_AXES, TABLE, parameter_shapes

GOLDEN = Path(__file__).with_name("golden") / "shardings.json"
MESHES = {"64 x v5p": (1, 4, 16, 1, 1), "256 x v5e": (1, 16, 16, 1, 1), "2 x 128, tensor 4": (2, 8, 4, 1, 4)}


def found() -> dict:
    shardings: dict[str, dict] = {}
    for name, sizes in MESHES.items():
        mesh = AbstractMesh(sizes, MESH_AXES)
        shardings[name] = {
            path: f"{TABLE[path].letters} {shape.shape} {TABLE[path].partition} "
            f"-> {NamedSharding(mesh, TABLE[path].partition).shard_shape(shape.shape)}"
            for path, shape in parameter_shapes(PRESETS["starcoderplus"]).items()
        }
    return shardings


def test_shardings_are_those_of_the_golden_file():
    assert found() == json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found(), indent=1) + "\n")
