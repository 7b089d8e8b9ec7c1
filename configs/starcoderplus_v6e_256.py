"""StarCoderPlus on 256 chips of TPU v6e (`v6e-256`), 4,194,304 tokens a step as 512 sequences of 8,192.

    aurora plan configs/starcoderplus_v6e_256.py --topology v6e:16x16 --model starcoderplus
    aurora train configs/starcoderplus_v6e_256.py --initial-checkpoint /mnt/BUCKET/starcoderplus \
        --output /mnt/BUCKET/cap

Planned (an estimate of the TPU compiler, 2026-11-25): 20.8 of 32 GiB a chip, 3.11 s a step (2.58 s compute,
0.49 s attention, 0.05 s of collectives that nothing hides), MFU at most 60.3%, 3.7 days for 435B tokens.
"""

from aurora_jax.model.config import ComputeConfig
from aurora_jax.train.config import MeshConfig, TrainConfig
from configs._starcoderplus import SPARSE_CORE, on_mesh


def config() -> TrainConfig:
    return on_mesh(
        MeshConfig(fsdp=8, fsdp_inner=32),
        ComputeConfig(rematerialisation="attention", separate_activation=True, compiler_options=SPARSE_CORE),
    )
