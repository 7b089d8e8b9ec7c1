"""StarCoderPlus on 256 chips of TPU v6e (`v6e-256`), 4,194,304 tokens a step as 2,048 sequences of 2,048.

    aurora plan configs/starcoderplus_v6e_256_2k.py --topology v6e:16x16 --model starcoderplus
    aurora train configs/starcoderplus_v6e_256_2k.py --initial-checkpoint /mnt/BUCKET/starcoderplus \
        --output /mnt/BUCKET/cap

Planned (an estimate of the TPU compiler, 2026-11-25): 21.2 of 32 GiB a chip, 3.00 s a step (2.82 s compute,
0.14 s attention, 0.04 s of collectives that nothing hides), MFU at most 57.1%, 3.6 days for 435B tokens.
"""

from aurora_jax.train.config import TrainConfig
from configs import starcoderplus_v6e_256
from configs._starcoderplus import with_2k_sequences


def config() -> TrainConfig:
    return with_2k_sequences(starcoderplus_v6e_256.config())
