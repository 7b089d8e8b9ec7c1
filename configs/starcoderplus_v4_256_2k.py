"""StarCoderPlus on 128 chips of TPU v4 (`v4-256`), 4,194,304 tokens a step as 2,048 sequences of 2,048.

    aurora plan configs/starcoderplus_v4_256_2k.py --topology v4:4x4x8 --model starcoderplus
    aurora train configs/starcoderplus_v4_256_2k.py --initial-checkpoint /mnt/BUCKET/starcoderplus \
        --output /mnt/BUCKET/cap

Planned (an estimate of the TPU compiler, 2026-11-25): 22.4 of 32 GiB a chip, 18.60 s a step (16.29 s compute,
0.58 s attention, 1.73 s of collectives that nothing hides), MFU at most 61.6%, 22.3 days for 435B tokens.
"""

from aurora_jax.train.config import TrainConfig
from configs import starcoderplus_v4_256
from configs._starcoderplus import with_2k_sequences


def config() -> TrainConfig:
    return with_2k_sequences(starcoderplus_v4_256.config())
