"""StarCoderPlus on 128 chips of TPU v4 (`v4-256`), 4,194,304 tokens a step as 2,048 sequences of 2,048.

    aurora plan configs/starcoderplus_v4_256_2k.py --topology v4:4x4x8 --model starcoderplus
    aurora train configs/starcoderplus_v4_256_2k.py --initial-checkpoint gs://.../starcoderplus --output gs://.../cap

PLAN
"""

from aurora_jax.train.config import TrainConfig
from configs import starcoderplus_v4_256
from configs._starcoderplus import with_2k_sequences


def config() -> TrainConfig:
    return with_2k_sequences(starcoderplus_v4_256.config())
