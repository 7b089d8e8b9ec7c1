"""StarCoderPlus on 64 chips of TPU v5p (`v5p-128`), 4,194,304 tokens a step as 2,048 sequences of 2,048.

    aurora plan configs/starcoderplus_v5p_128_2k.py --topology v5p:4x4x4 --model starcoderplus
    aurora train configs/starcoderplus_v5p_128_2k.py --initial-checkpoint /mnt/BUCKET/starcoderplus \
        --output /mnt/BUCKET/cap

Planned (an estimate of the TPU compiler, 2026-11-23, its attention 2026-11-25): 65.2 of 95 GiB a chip,
15.22 s a step (14.48 s compute, 0.58 s attention, 0.16 s of collectives that nothing hides), MFU at most 90.2%,
18.3 days for 435B tokens.
"""

from aurora_jax.train.config import TrainConfig
from configs import starcoderplus_v5p_128
from configs._starcoderplus import with_2k_sequences


def config() -> TrainConfig:
    return with_2k_sequences(starcoderplus_v5p_128.config())
