"""Run by test_program.py in a process with eight CPU devices: `aurora train` of runs that cannot be.

Prints, for each, the exit status, whether anything was left behind, and what was said.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

from aurora_jax.cli import main

CONFIG = """
from pathlib import Path
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.train.config import DataConfig, EvaluationConfig, TrainConfig
from aurora_jax.train.stages import LearningRate, Stage

def config():
    return TrainConfig(
        output=Path("none"),
        stages=(Stage("s", "nothing_is_read", 2, LearningRate(1e-3)),),
        data=DataConfig(corpus="not/there", tokenizer="bytes", batch_size=16, sequence_length=16),
        model=ModelConfig({vocabulary}, 16, {width}, 2, {heads}, {mlp}),
        compute=ComputeConfig("float32", "float32"),
        evaluation=EvaluationConfig(tasks=("sample_en",), batch_size=16),
    )
"""
SIZES = {"vocabulary": 512, "width": 32, "heads": 4, "mlp": 64}


def run(folder: Path, flags: list[str], **sizes: int) -> None:
    path, output = folder / "config.py", folder / "output"
    path.write_text(CONFIG.format(**(SIZES | sizes)))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = main(["train", str(path), "--output", str(output), *flags])
        except SystemExit as end:
            status = end.code
    left = sorted(str(file.relative_to(output)) for file in output.rglob("*")) if output.exists() else []
    print(json.dumps({"status": status, "left": left, "said": said.getvalue()}), flush=True)


for flags, sizes in json.loads(sys.argv[2]):
    run(Path(sys.argv[1]), flags, **sizes)
