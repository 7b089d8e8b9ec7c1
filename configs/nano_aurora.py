"""Aurora-M's two stages, small: continual pretraining of the nano base in five languages and code, then a
shorter, cleaner mixture.

Stage `cap` draws on all languages with English and code replayed; stage `cat` goes on with the cleaner texts
on the same falling learning rate, as Aurora-M's second stage rode on the tail of its first. `make quickstart`
runs it between conversions; alone:

    aurora data sample corpus
    python -m convert from-torch examples/nano checkpoints/nano --dtype float32
    aurora train configs/nano_aurora.py --data.corpus corpus --initial-checkpoint checkpoints/nano \
        --output runs/nano_aurora
    aurora report runs/nano_aurora
"""

from pathlib import Path

from aurora_jax.model.config import ComputeConfig
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from aurora_jax.train.stages import LearningRate, Stage


def config() -> TrainConfig:
    return TrainConfig(
        output=Path("runs/nano_aurora"),
        initial_checkpoint=Path("checkpoints/nano"),
        stages=(
            Stage(
                "cap",
                "nano_cap",
                steps=210,
                learning_rate=LearningRate(peak=1.5e-3, warmup_steps=20, final=1e-4, decay_steps=250),
            ),
            Stage("cat", "nano_cat", steps=60),
        ),
        data=DataConfig(corpus="corpus", batch_size=32, sequence_length=256),
        compute=ComputeConfig(activation_dtype="float32", unroll_layers=True),
        optimizer=OptimizerConfig(micro_batches=8),  # a working set that stays in the cache: 1.4 times as fast on CPU
        evaluation=EvaluationConfig(
            tasks=("sample_en", "sample_code", "sample_fi", "sample_hi", "sample_ja", "sample_vi"),
            keep=("sample_en", "sample_code"),
            every=30,
            quick_windows=32,
            batch_size=32,
            prompts=(
                ("en", "The settings of the document"),
                ("code", "def read_file(path):\n"),
                ("fi", "Helsinki on"),
                ("hi", "यह दस्तावेज़"),
                ("ja", "このファイルを"),
                ("vi", "Bạn có thể"),
            ),
        ),
        checkpoint=CheckpointConfig(every=100),
    )
