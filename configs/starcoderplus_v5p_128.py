"""Aurora-M's first stage on 64 chips of TPU v5p (`v5p-128`): StarCoderPlus, 15.5B, 4,194,304 tokens a step as 512 sequences of 8,192.

    aurora plan configs/starcoderplus_v5p_128.py --topology v5p:4x4x4 --model starcoderplus
    aurora train configs/starcoderplus_v5p_128.py --initial-checkpoint gs://.../starcoderplus --output gs://.../cap

The stage table names the nano mixtures of the sample corpus until the mixtures of Aurora-M's own sources are registered.
"""

from pathlib import Path

from aurora_jax.model.config import ComputeConfig
from aurora_jax.train.config import CheckpointConfig, DataConfig, EvaluationConfig, MeshConfig, OptimizerConfig, TrainConfig
from aurora_jax.train.stages import LearningRate, Stage


def config() -> TrainConfig:
    return TrainConfig(
        output=Path("runs/starcoderplus_cap"),
        initial_checkpoint=Path("checkpoints/starcoderplus"),
        stages=(Stage("cap", "nano_cap", steps=90_000, learning_rate=LearningRate(peak=1e-4, warmup_steps=2_000, final=1e-5)),),
        data=DataConfig(corpus=Path("corpus"), batch_size=512, sequence_length=8_192),
        mesh=MeshConfig(fsdp=4, fsdp_inner=16),
        compute=ComputeConfig(
            attention="flash", rematerialisation="products", compiler_options=(("xla_tpu_scoped_vmem_limit_kib", "98304"),)
        ),
        optimizer=OptimizerConfig(micro_batches=4),
        evaluation=EvaluationConfig(every=1_000, batch_size=64),
        checkpoint=CheckpointConfig(every=500),
    )
