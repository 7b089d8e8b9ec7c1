"""What the `starcoderplus_*` configs share: Aurora-M's two stages from StarCoderPlus, 15.5B, at 4,194,304
tokens a step.

377B tokens of `aurora_m_cap`, then 58B of `aurora_m_cat` on the same falling learning rate. Peak, warm-up and
floor are ours: Aurora-M's are not known (docs/reproduction.md). The run is judged on the held-out text of the sample
corpus, the same messages in all five languages and code: of Aurora-M's own sources only some English ones and
instructions have a held-out part.
"""

from dataclasses import replace
from pathlib import Path

from aurora_jax.model.config import ComputeConfig
from aurora_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from aurora_jax.train.stages import LearningRate, Stage

TOKENS = 4_194_304
MORE_SCRATCH = (("xla_tpu_scoped_vmem_limit_kib", "98304"),)
"""Lets the compiler use more on-chip memory in one operation: 15 to 25 % fewer cycles, a compilation of five
minutes instead of one."""
SPARSE_CORE = (
    ("xla_tpu_enable_sparse_core_collective_offload_all_gather", "true"),
    ("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", "true"),
)
"""Gives gathers and scatters to the SparseCores (v5p, v6e), which run beside the TensorCores: they hide
behind computation."""


def on_mesh(mesh: MeshConfig, compute: ComputeConfig, *, micro_batches: int = 1) -> TrainConfig:
    """The run on a mesh, as 512 sequences of 8,192 tokens."""
    rows = mesh.data * mesh.fsdp * mesh.fsdp_inner
    return TrainConfig(
        output=Path("runs/aurora_m"),
        initial_checkpoint=Path("checkpoints/starcoderplus"),
        stages=(
            Stage(
                "cap",
                "aurora_m_cap",
                90_000,
                LearningRate(peak=1e-4, warmup_steps=2_000, final=1e-5, decay_steps=118_000),
            ),
            Stage("cat", "aurora_m_cat", 14_000),
        ),
        data=DataConfig(corpus="data", batch_size=TOKENS // 8_192, sequence_length=8_192),
        mesh=mesh,
        compute=replace(compute, attention="flash", compiler_options=MORE_SCRATCH + compute.compiler_options),
        optimizer=OptimizerConfig(micro_batches=micro_batches, spike_sigmas=6.0),
        evaluation=EvaluationConfig(
            tasks=("sample_en", "sample_code", "sample_fi", "sample_hi", "sample_ja", "sample_vi"),
            keep=("sample_en", "sample_code"),
            every=1_000,
            quick_windows=rows,
            batch_size=rows,
        ),
        checkpoint=CheckpointConfig(every=500, keep_every=10_000),
        compare_devices_every=1_000,
    )


def with_2k_sequences(config: TrainConfig) -> TrainConfig:
    """The same run as 2,048 sequences of 2,048 tokens, the length of Aurora-M's released weights."""
    return replace(config, data=replace(config.data, batch_size=TOKENS // 2_048, sequence_length=2_048))
