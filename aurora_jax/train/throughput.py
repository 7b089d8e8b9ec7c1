"""How fast a run is, in the numbers of `aurora plan`."""

from dataclasses import dataclass

from aurora_jax.chips import chip_of
from aurora_jax.model.config import ModelConfig
from aurora_jax.model.flops import flops_per_token


@dataclass(frozen=True)
class Throughput:
    """Turns steps per second into the three figures that runs are compared by."""

    tokens: int
    """Of a step, over all chips: batch size times sequence length, whether or not they carry a loss."""
    chips: int
    """Devices of the run: chips on TPU (the two cores of a v4 or v5p are one device); on CPU, what XLA calls
    a device."""
    flops_per_token: float
    """As `aurora_jax.model.flops.flops_per_token` has them."""
    peak: float | None
    """bf16 FLOP/s of a chip; None where it is not known, as on CPU."""

    @classmethod
    def of(
        cls, model: ModelConfig, *, batch_size: int, sequence_length: int, chips: int, device_kind: str
    ) -> "Throughput":
        """For a model on chips of one kind; `device_kind` as `jax.Device.device_kind` says it."""
        chip = chip_of(device_kind)
        return cls(
            batch_size * sequence_length, chips, flops_per_token(model, sequence_length), chip.peak if chip else None
        )

    def at(self, steps_per_second: float) -> dict[str, float]:
        """The figures by name: tokens_per_second, tokens_per_second_per_chip and, where the peak is known,
        mfu (1 is the peak).

        mfu = tokens/s/chip x FLOPs a token / peak FLOP/s of a chip (Chowdhery et al. 2022, arXiv 2204.02311,
        appendix B): what the model needs, without what is computed again.
        """
        rate = self.tokens * steps_per_second
        figures = {"tokens_per_second": rate, "tokens_per_second_per_chip": rate / self.chips}
        if self.peak is not None:
            figures["mfu"] = rate / self.chips * self.flops_per_token / self.peak
        return figures
