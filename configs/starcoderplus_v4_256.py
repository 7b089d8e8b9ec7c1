"""StarCoderPlus on 128 chips of TPU v4 (`v4-256`), 4,194,304 tokens a step as 512 sequences of 8,192.

    aurora plan configs/starcoderplus_v4_256.py --topology v4:4x4x8 --model starcoderplus
    aurora train configs/starcoderplus_v4_256.py --initial-checkpoint gs://.../starcoderplus --output gs://.../cap

PLAN
"""

from aurora_jax.model.config import ComputeConfig
from aurora_jax.train.config import MeshConfig, TrainConfig
from configs._starcoderplus import on_mesh


def config() -> TrainConfig:
    return on_mesh(MeshConfig(fsdp=8, fsdp_inner=16), ComputeConfig(rematerialisation="attention"), micro_batches=2)
