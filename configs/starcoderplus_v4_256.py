"""StarCoderPlus on 128 chips of TPU v4 (`v4-256`), 4,194,304 tokens a step as 512 sequences of 8,192.

    aurora plan configs/starcoderplus_v4_256.py --topology v4:4x4x8 --model starcoderplus
    aurora train configs/starcoderplus_v4_256.py --initial-checkpoint /mnt/BUCKET/starcoderplus --output /mnt/BUCKET/cap

Planned (an estimate of the TPU compiler, 2026-11-25): 24.5 of 32 GiB a chip, 20.70 s a step (16.77 s compute,
2.20 s attention, 1.73 s of collectives that nothing hides), MFU at most 60.5%, 24.8 days for 435B tokens.
"""

from aurora_jax.model.config import ComputeConfig
from aurora_jax.train.config import MeshConfig, TrainConfig
from configs._starcoderplus import on_mesh


def config() -> TrainConfig:
    return on_mesh(MeshConfig(fsdp=8, fsdp_inner=16), ComputeConfig(rematerialisation="attention"), micro_batches=2)
