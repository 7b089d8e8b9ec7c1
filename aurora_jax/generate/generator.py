"""`Generator`: a model on its devices, ready to continue prompts of token ids.

B batch, L slots of the prompt, S slots of the cache, T new tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import stages
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.checkpoints import format as checkpoint
from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.errors import InputError
from aurora_jax.generate import decoding
from aurora_jax.generate.decoding import DecodingState
from aurora_jax.generate.sampling import Sampling
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import structure_of
from aurora_jax.model.division import Division
from aurora_jax.model.sharding import TENSOR_AXIS, dimensions, nest, parameter_shapes, rows_of
from aurora_jax.storage.places import Location

ROWS_AXIS = "fsdp"
"""Mesh axis over which the rows of a batch are divided; weights are whole along it."""

PROMPT_SLOTS = 64
"""Prompts are padded to a multiple of this; see `prompt_slots`."""

ROWS_ON_TPU = 2
"""Fewest rows of a device's part of a batch on TPU: for a single one the compiler multiplies on the vector
unit, 4.8 times as slowly."""

GREEDY = Sampling()

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class Completion:
    """What one prompt was continued with."""

    tokens: list[int]
    """Without the end-of-text token."""
    finish_reason: FinishReason
    """The end-of-text token, the number of tokens asked for, or the caller (a stop string)."""


Listener = Callable[[int, list[int]], bool]
"""Gets a row's number and its new tokens, as they come; True ends the row."""


def make_inference_mesh(config: ModelConfig, devices: Sequence[jax.Device], tensor: int | None = None) -> Mesh:
    """Devices as rows x tensor.

    Args:
        tensor: devices that share a model; without it as many as its heads, feed-forward columns and
            vocabulary can be divided over.

    Raises:
        InputError: `tensor` does not divide the devices or the model.
    """
    sizes = dimensions(config)

    def suits(count: int) -> bool:
        return len(devices) % count == 0 and all(sizes[letter] % count == 0 for letter in "HFV")

    if tensor is None:
        tensor = max(count for count in range(1, len(devices) + 1) if suits(count))
    elif tensor < 1 or not suits(tensor):
        raise InputError(
            f"The model cannot be divided over {tensor} of {len(devices)} devices: its {config.heads} heads, "
            f"{config.mlp_width} "
            f"feed-forward columns and {config.vocabulary_size} tokens, and the devices, must be divisible by it."
        )
    return Mesh(np.asarray(devices).reshape(-1, tensor), (ROWS_AXIS, TENSOR_AXIS))


class Generator:
    """Continues prompts. Programs are compiled for each batch size, `prompt_slots` of the longest prompt, and
    number of new tokens.

    Args:
        config: the model.
        parameters: its nested dictionary, layers stacked; they are taken apart by layer, and their arrays deleted. Or
            layers as a list: they stay as they are.
        compute: precision and attention implementation. Parameters keep theirs.
        mesh: from `make_inference_mesh`, with parameters sharded by `shardings`; None for one device.
        programs: those of an earlier generator of the same model, compute and mesh, to compile nothing twice.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: dict,
        compute: ComputeConfig,
        mesh: Mesh | None = None,
        programs: "Programs | None" = None,
    ):
        self.config = config
        self.mesh = mesh if mesh is not None and mesh.size > 1 else None
        taken_apart = isinstance(parameters["layers"], list)
        self._parameters = parameters if taken_apart else decoding.unstacked(parameters)
        self._programs = programs or Programs(config, compute, self.mesh)
        self._parts = 1 if self.mesh is None else self.mesh.shape[ROWS_AXIS]
        self._fewest = ROWS_ON_TPU * self._parts if jax.default_backend() == "tpu" else 1

    @classmethod
    def from_checkpoint(cls, path: Location, compute: ComputeConfig, mesh: Mesh | None = None) -> "Generator":
        """A checkpoint's model, its parameters in the precision of its activations, each read straight into
        its devices.

        Raises:
            InputError: not a checkpoint, or a damaged one.
        """
        config = checkpoint.read_metadata(path).config
        placed = None if mesh is None or mesh.size == 1 else shardings(config, mesh)
        parameters = restore_parameters(path, dtype=compute.activation_dtype, shardings=placed)
        return cls(config, parameters, compute, mesh)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        *,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        eos_ids: Sequence[int] = (),
        excluded_ids: Sequence[int] = (),
        new_tokens: int | None = None,
        batch_size: int | None = None,
        listener: Listener | None = None,
        every: int | None = None,
    ) -> list[Completion]:
        """Continues each prompt by up to `max_new_tokens` tokens.

        A row's tokens depend on itself and on the program that is compiled: `batch_size`, `prompt_slots` of
        the longest prompt, and `new_tokens`. Where these are the same, other rows change no bit of it; where
        not, sums are rounded in another order.

        Args:
            prompts: token ids, of any lengths.
            max_new_tokens: of all rows, or of each.
            seeds: of each row's draws, below 2^32; 0, 1, ... without them.
            eos_ids: tokens that end a row.
            excluded_ids: tokens that are never drawn, such as those that the tokenizer does not have.
            new_tokens: what the program is compiled for, where it is more than any row's limit.
            batch_size: rows of the compiled program, where it is more than there are prompts.
            listener: is called with new tokens of each row that has not ended.
            every: steps between two calls of it; without it, all in one loop on the device.

        Raises:
            InputError: an empty prompt, tokens outside the vocabulary, more tokens than the model has
                positions, or a seed out of range.
        """
        limits = list(max_new_tokens) if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * len(prompts)
        check_prompts(self.config, prompts, limits)
        if seeds is not None and not all(0 <= seed < 1 << 32 for seed in seeds):
            raise InputError(f"Seeds of rows lie between 0 and 2^32 - 1, not {', '.join(map(str, seeds))}.")
        T = max(*limits, new_tokens or 0)
        B = -(-max(len(prompts), batch_size or 0, self._fewest) // self._parts) * self._parts
        L = max(map(prompt_slots, prompts))
        tokens_BL = np.zeros((B, L), np.int32)
        padding_B = np.zeros(B, np.int32)
        for row, prompt in enumerate(prompts):
            padding_B[row] = L - len(prompt)
            tokens_BL[row, padding_B[row] :] = prompt
        limits_B = np.full(B, T, np.int32)
        limits_B[: len(prompts)] = limits
        finished_B = np.arange(B) >= len(prompts)
        seeds_B = np.arange(B, dtype=np.uint32)
        if seeds is not None:
            seeds_B[: len(prompts)] = seeds

        put = self._programs.put_rows
        settings = GenerationSettings(L, T, sampling, tuple(eos_ids), tuple(excluded_ids))
        rows = (tokens_BL, padding_B, seeds_B, limits_B, finished_B)
        state = self._programs.prefill(settings)(self._parameters, *map(put, rows))
        decode = self._programs.decode(settings)
        heard: np.ndarray = np.zeros(len(prompts), np.int32)
        stopped = np.zeros(B, bool)
        while True:
            drawn, lengths_B, ended_B = _fetched((state.drawn, state.lengths_B, state.finished_B))
            if listener is not None:
                tokens_BT = _fetched(state.tokens_BT)
                before = stopped.copy()
                for row in map(int, np.flatnonzero((lengths_B[: len(prompts)] > heard) & ~stopped[: len(prompts)])):
                    stopped[row] = listener(row, tokens_BT[row, heard[row] : lengths_B[row]].tolist())
                heard = lengths_B[: len(prompts)]
                if (stopped & ~before & ~ended_B).any():
                    state = state._replace(finished_B=put(ended_B | stopped))
            if drawn == T or (ended_B | stopped).all():
                break
            state = decode(self._parameters, state, jnp.int32(every or T))
        tokens_BT, lengths_B = _fetched((state.tokens_BT, state.lengths_B))
        reasons: list[FinishReason] = [
            "stop" if stop else "length" if full else "eos"
            for stop, full in zip(stopped, lengths_B == limits_B, strict=True)
        ]
        return [Completion(tokens_BT[row, : lengths_B[row]].tolist(), reasons[row]) for row in range(len(prompts))]


def prompt_slots(prompt: Sequence[int]) -> int:
    """Slots that a prompt is padded to: a multiple of PROMPT_SLOTS, beyond 16 of them at most an eighth more
    than it needs.

    One compiled program serves all prompts that have as many: 24 serve those up to 2,048 tokens, 40 those up to 8,192.
    """
    needed = -(-len(prompt) // PROMPT_SLOTS)
    step = 1 << max(0, (needed - 1).bit_length() - 4)
    return -(-needed // step) * step * PROMPT_SLOTS


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    """Raises InputError unless the model can continue each prompt by so many tokens."""
    if not prompts:
        raise InputError("There is no prompt.")
    for number, (prompt, max_new_tokens) in enumerate(zip(prompts, limits, strict=True)):
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}: it must be at least 1.")
        which = f"Prompt {number}" if len(prompts) > 1 else "The prompt"
        if not len(prompt):
            raise InputError(f"{which} is empty: a model continues text, give it at least one token.")
        if min(prompt) < 0 or max(prompt) >= config.vocabulary_size:
            wrong = next(token for token in prompt if not 0 <= token < config.vocabulary_size)
            raise InputError(
                f"{which} holds the token {wrong}; the model has {config.vocabulary_size}. Is it another "
                "model's tokenizer?"
            )
        if len(prompt) + max_new_tokens > config.longest_sequence:
            raise InputError(
                f"{which} has {len(prompt)} tokens; with {max_new_tokens} new ones that is "
                f"{len(prompt) + max_new_tokens}, and the model "
                f"has learned only {config.max_positions} positions (n_positions): shorten the prompt, or ask "
                "for fewer tokens."
            )


def shardings(config: ModelConfig, mesh: Mesh) -> dict:
    """Of the stacked parameters for inference: divided over `tensor` as the table has it, and whole along the
    other axes."""
    return nest({path: NamedSharding(mesh, partition) for path, partition in _partitions(config).items()})


def unstacked_shapes(config: ModelConfig, dtype: jnp.dtype | str) -> dict:
    """Shapes of what `decoding.unstacked` gives, for programs that are only compiled."""
    return _of_each_layer(
        parameter_shapes(config, dtype), lambda shape: jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype), config.layers
    )


def _of_each_layer(flat: Mapping[str, Any], of_one_layer: Callable[[Any], Any], layers: int) -> dict:
    """What is said of each stacked parameter, said of the unstacked ones."""
    outside = nest({path: value for path, value in flat.items() if not path.startswith("layers.")})
    layer = nest(
        {
            path.removeprefix("layers."): of_one_layer(value)
            for path, value in flat.items()
            if path.startswith("layers.")
        }
    )
    return {**outside, "layers": [layer] * layers}


def _partitions(config: ModelConfig) -> dict[str, PartitionSpec]:
    return {path: PartitionSpec(*map(_tensor_only, row.partition)) for path, row in rows_of(config).items()}


def _fetched(arrays: Any) -> Any:
    """Arrays as numpy ones on every process, rows of other processes' devices included."""
    if all(array.is_fully_addressable for array in jax.tree.leaves(arrays)):
        return jax.device_get(arrays)
    return multihost_utils.process_allgather(arrays, tiled=True)


def _tensor_only(entry: Any) -> str | None:
    return TENSOR_AXIS if TENSOR_AXIS in (entry if isinstance(entry, tuple) else (entry,)) else None


@dataclass(frozen=True)
class GenerationSettings:
    """What a pair of programs is compiled for, beside the batch."""

    prompt_slots: int
    new_tokens: int
    sampling: Sampling
    eos_ids: tuple[int, ...]
    excluded_ids: tuple[int, ...] = ()

    @property
    def slots(self) -> int:
        # The last token is drawn but not read.
        return self.prompt_slots + self.new_tokens - 1


class Programs:
    """The jitted programs of a model on a mesh, by their settings."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, mesh: Mesh | None):
        self.config = config
        self.compute = compute
        self.mesh = mesh
        division = Division() if mesh is None else Division(tensor=TENSOR_AXIS if mesh.shape[TENSOR_AXIS] > 1 else None)
        self._structure = structure_of(config, compute, division)
        self._jitted: dict[tuple[str, GenerationSettings], stages.Wrapped] = {}

    def put_rows(self, array: np.ndarray) -> jax.Array:
        """An array [B, ...] on the devices."""
        return jax.device_put(array, None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(ROWS_AXIS)))

    def prefill(self, settings: GenerationSettings) -> stages.Wrapped:
        """`prefill(parameters, tokens_BL, padding_B, seeds_B, limits_B, finished_B)`."""

        def make() -> stages.Wrapped:
            program = partial(
                decoding.prefill,
                self._structure,
                slots=settings.slots,
                new_tokens=settings.new_tokens,
                **self._common(settings),
            )
            rows = PartitionSpec(ROWS_AXIS)
            return jax.jit(self._divided(program, (self.parameters_spec(), rows, rows, rows, rows, rows), settings))

        return self._kept("prefill", settings, make)

    def decode(self, settings: GenerationSettings) -> stages.Wrapped:
        """`decode(parameters, state, steps)`; the state is donated."""

        def make() -> stages.Wrapped:
            program = partial(
                decoding.decode, self._structure, prompt_slots=settings.prompt_slots, **self._common(settings)
            )
            specs = (self.parameters_spec(), self.state_spec(settings.sampling), PartitionSpec())
            return jax.jit(self._divided(program, specs, settings), donate_argnums=1)

        return self._kept("decode", settings, make)

    def parameters_spec(self) -> dict:
        """Partition of the unstacked parameters."""
        return _of_each_layer(
            _partitions(self.config), lambda partition: PartitionSpec(*partition[1:]), self.config.layers
        )

    def state_spec(self, sampling: Sampling) -> DecodingState:
        """Partition of the state: rows over their axis, and over `tensor` the keys and values of heads that
        are not shared."""
        rows, whole = PartitionSpec(ROWS_AXIS), PartitionSpec()
        caches = (
            PartitionSpec(ROWS_AXIS if self.config.kv_heads == 1 else (ROWS_AXIS, TENSOR_AXIS)),
        ) * self.config.layers
        others = {
            "drawn": whole,
            "unfinished": whole,
            "seen_BV": None if sampling.repetition_penalty == 1 else rows,
            "keys": caches,
            "values": caches,
        }
        return DecodingState._make(others.get(name, rows) for name in DecodingState._fields)

    def _common(self, settings: GenerationSettings) -> dict[str, Any]:
        axes = (ROWS_AXIS,) if self.mesh is not None else ()
        return {
            "sampling": settings.sampling,
            "eos_ids": settings.eos_ids,
            "excluded_ids": settings.excluded_ids,
            "batch_axes": axes,
        }

    def _divided(self, program: Callable, in_specs: tuple, settings: GenerationSettings) -> Callable:
        if self.mesh is None:
            return program
        return jax.shard_map(
            program, mesh=self.mesh, in_specs=in_specs, out_specs=self.state_spec(settings.sampling), check_vma=False
        )

    def _kept(self, name: str, settings: GenerationSettings, make: Callable[[], stages.Wrapped]) -> stages.Wrapped:
        if (name, settings) not in self._jitted:
            self._jitted[name, settings] = make()
        return self._jitted[name, settings]
