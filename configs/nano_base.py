"""The base model of `examples/nano`: 3.4M parameters, English and code alone. It stands for StarCoderPlus in
the quickstart.

    aurora data sample corpus
    aurora data tokenizer corpus tokenizer --vocabulary-size 4096
    aurora train configs/nano_base.py --data.corpus corpus --data.tokenizer tokenizer --output runs/nano_base
    python -m convert to-torch runs/nano_base examples/nano --dtype bfloat16
"""

from pathlib import Path

from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, TrainConfig
from aurora_jax.train.stages import LearningRate, Stage


def config() -> TrainConfig:
    return TrainConfig(
        output=Path("runs/nano_base"),
        model=ModelConfig(vocabulary_size=4_096, max_positions=256, width=256, layers=4, heads=4, mlp_width=768),
        stages=(
            Stage(
                "base", "nano_base", steps=1_200, learning_rate=LearningRate(peak=3e-3, warmup_steps=100, final=3e-4)
            ),
        ),
        data=DataConfig(corpus="corpus", tokenizer=Path("tokenizer"), batch_size=32, sequence_length=256),
        compute=ComputeConfig(activation_dtype="float32", unroll_layers=True),
        evaluation=EvaluationConfig(
            tasks=("sample_en", "sample_code", "sample_fi", "sample_hi", "sample_ja", "sample_vi"), every=200
        ),
        checkpoint=CheckpointConfig(every=200),
    )
