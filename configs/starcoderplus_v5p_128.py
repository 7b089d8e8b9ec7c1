"""StarCoderPlus on 64 chips of TPU v5p (`v5p-128`), 4,194,304 tokens a step as 512 sequences of 8,192.

    aurora plan configs/starcoderplus_v5p_128.py --topology v5p:4x4x4 --model starcoderplus
    aurora train configs/starcoderplus_v5p_128.py --initial-checkpoint /mnt/BUCKET/starcoderplus \
        --output /mnt/BUCKET/cap

Planned (an estimate of the TPU compiler, 2026-11-25): 65.2 of 95 GiB a chip, 16.91 s a step (14.66 s compute,
2.09 s attention, 0.16 s of collectives that nothing hides), MFU at most 88.8%, 20.3 days for 435B tokens.
"""

from aurora_jax.model.config import ComputeConfig
from aurora_jax.train.config import MeshConfig, TrainConfig
from configs._starcoderplus import SPARSE_CORE, on_mesh


def config() -> TrainConfig:
    return on_mesh(
        MeshConfig(fsdp=16, fsdp_inner=4, gather="step"),
        ComputeConfig(rematerialisation="products", row_major_residual=True, compiler_options=SPARSE_CORE),
        micro_batches=8,
    )
