"""StarCoderPlus on 256 chips of TPU v5e (`v5litepod-256`), 4,194,304 tokens a step as 2,048 sequences of 2,048.

    aurora plan configs/starcoderplus_v5e_256_2k.py --topology v5e:16x16 --model starcoderplus
    aurora train configs/starcoderplus_v5e_256_2k.py --initial-checkpoint /mnt/BUCKET/starcoderplus \
        --output /mnt/BUCKET/cap

Planned (an estimate of the TPU compiler, 2026-11-25): 13.3 of 16 GiB a chip, 10.81 s a step (9.96 s compute,
0.44 s attention, 0.41 s of collectives that nothing hides), MFU at most 73.9%, 13.0 days for 435B tokens.
"""

from aurora_jax.train.config import TrainConfig
from configs import starcoderplus_v5e_256
from configs._starcoderplus import with_2k_sequences


def config() -> TrainConfig:
    return with_2k_sequences(starcoderplus_v5e_256.config())
