"""StarCoderPlus on 256 chips of TPU v5e (`v5litepod-256`), 4,194,304 tokens a step as 512 sequences of 8,192.

    aurora plan configs/starcoderplus_v5e_256.py --topology v5e:16x16 --model starcoderplus
    aurora train configs/starcoderplus_v5e_256.py --initial-checkpoint /mnt/BUCKET/starcoderplus \
        --output /mnt/BUCKET/cap

Planned (an estimate of the TPU compiler, 2026-11-25): 12.9 of 16 GiB a chip, 12.12 s a step (10.14 s compute,
1.57 s attention, 0.41 s of collectives that nothing hides), MFU at most 72.2%, 14.5 days for 435B tokens.
"""

from aurora_jax.model.config import ComputeConfig
from aurora_jax.train.config import MeshConfig, TrainConfig
from configs._starcoderplus import on_mesh


def config() -> TrainConfig:
    return on_mesh(MeshConfig(fsdp=16, fsdp_inner=16), ComputeConfig(rematerialisation="full"))
