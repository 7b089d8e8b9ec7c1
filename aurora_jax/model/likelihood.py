"""The likelihood of a batch: one program for the loss of training, for evaluation, and for all that judge text.

A batch is any tuple of arrays that has `tokens_BL`, `targets_BL`, `loss_weights_BL` and `isolation` as the
loader's `Batch` has them. On a mesh everything happens in one `shard_map` (`on_mesh`): rows are divided over
data and fsdp, places over `sequence`, and each device gathers the weights that it multiplies with, a layer at
a time (`division.py`).

B batch, L sequence, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.errors import InputError
from aurora_jax.model.attention import require_implementation
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import Decoder, merge, structure_of
from aurora_jax.model.division import WHOLE, Division
from aurora_jax.model.loss import cross_entropy, nll_and_prediction
from aurora_jax.model.mesh import batch_parts
from aurora_jax.model.sharding import BATCH_AXES, SEQUENCE_AXIS, TABLE, flatten, nest, require_divisible

ROWS, GRID = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, SEQUENCE_AXIS)
"""How arrays [B] and [B, L] lie on a mesh."""
EVERYWHERE = (*BATCH_AXES, SEQUENCE_AXIS)
"""The axes along which a batch is divided."""


def make_loss(
    structure: nnx.GraphDef,
    compute: ComputeConfig,
    *,
    z_loss: float,
    isolate_documents: bool,
    division: Division = WHOLE,
) -> Callable:
    """`loss(parameters, batch, total_weight, dropout_key, gathered_layers) -> (loss, nll_BL)`; see `cross_entropy`.
    The batch is traced.

    With a division the function runs inside `shard_map`, on one device's part of the parameters and of the
    batch, and its loss is that part of the whole.
    """
    product_dtype = jnp.dtype(compute.compute_dtype)

    def loss(
        parameters: dict,
        batch: Any,
        total_weight: jax.Array,
        dropout_key: jax.Array | None,
        gathered_layers: dict | None = None,
    ):
        decoder = _decoder(structure, parameters, division, product_dtype)
        hidden_BLD = decoder(
            batch.tokens_BL,
            dropout_key=dropout_key,
            gathered_layers=gathered_layers,
            **batch.isolation(isolate_documents),
        )
        return cross_entropy(
            division.enter(hidden_BLD),
            decoder.token_embedding.embedding[...],
            batch.targets_BL,
            batch.loss_weights_BL,
            total_weight,
            dtype=product_dtype,
            z_loss=z_loss,
            vocabulary_axis=division.tensor,
            vocabulary_size=decoder.config.vocabulary_size,
        )

    return loss


def _decoder(structure: nnx.GraphDef, parameters: dict, division: Division, product_dtype: jnp.dtype) -> Decoder:
    """With what stands outside the layers whole on each device."""
    if division.fsdp:
        # Gathered rounded, then fp32 again: a common token's gradient is a sum of many.
        outside = {name: tree for name, tree in parameters.items() if name != "layers"}
        gathered = division.gather(outside, dtype=product_dtype)
        parameters = {**parameters, **jax.tree.map(lambda array: array.astype(jnp.float32), gathered)}
    return merge(structure, parameters)


def _places(array: jax.Array) -> PartitionSpec:
    return GRID if array.ndim == 2 else ROWS


def on_mesh(
    local: Callable,
    mesh: Mesh,
    out_specs: Callable[[dict], Any],
    batch_specs: Callable[[Any], Any] = lambda batch: jax.tree.map(_places, batch),
) -> Callable:
    """`divided(parameters, batch, *others)` of global arrays: `local` of each device's part of them, in one
    `shard_map`.

    Args:
        local: gets parameters as the sharding table divides them, its rows and places of the batch, and all
            of the others.
        out_specs: where the results lie, given where the parameters do.
        batch_specs: where the batch lies: arrays [B, L] by rows and places, others by rows.
    """

    def divided(parameters: dict, batch: Any, *others: Any):
        parameters_spec = nest({path: TABLE[path].partition for path in flatten(parameters)})
        specs = (parameters_spec, batch_specs(batch), *(PartitionSpec() for _ in others))
        shard = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs(parameters_spec), check_vma=False)
        return shard(parameters, batch, *others)

    return divided


class BatchNll(NamedTuple):
    """Negative log-likelihoods of a batch, in nats, fp32."""

    token_nll_BL: jax.Array
    """Of every target, whatever its weight."""
    nll: jax.Array
    """Their weighted sum."""
    weight: jax.Array
    """The sum of the weights: the number of tokens that are asked for."""


class Questions(NamedTuple):
    """Which tokens of some texts are asked for, and how likely others would be in their place.

    Attributes:
        tokens_BL: int32; what stands right of a text is seen by none of it.
        places_U: int32, row x L + place: the token behind this place is asked for. Several may ask for one place. On a
            mesh an equal number for each part of the rows (`mesh.batch_parts`), whose rows are counted from 0.
        targets_U: int32, the tokens.
        positions_BL: int32, of each token in its text, and
        segment_ids_BL: int32, the text that it is of, where a row has several that begin alike: `attention.EVERYONES`
            for their beginning, which stands there once. None where a row is one text.
    """

    tokens_BL: Any
    places_U: Any
    targets_U: Any
    positions_BL: Any = None
    segment_ids_BL: Any = None


class Answers(NamedTuple):
    """To `Questions`."""

    nll_U: jax.Array
    """Of each target, in nats, fp32."""
    predicted_U: jax.Array
    """The token that is most likely in its place, int32."""


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds the targets of a batch: `likelihood(parameters, batch) -> BatchNll`, compiled
    for the mesh.

    The precision, the attention and the masks are those of the arguments, and there is no dropout. Example:

        likelihood = Likelihood(model, ComputeConfig(), make_mesh(MeshConfig()), isolate_documents=False)
        likelihood(parameters, place(likelihood.mesh, batch)).token_nll_BL
    """

    model: ModelConfig
    compute: ComputeConfig
    mesh: Mesh
    isolate_documents: bool
    """Documents of a sequence do not attend to each other."""

    @property
    def program(self) -> jax.stages.Wrapped:
        """What a call runs, to be lowered where nothing is to run."""
        return _program(self)

    def __call__(self, parameters: dict, batch: Any) -> BatchNll:
        """Of parameters and a batch that lie on the mesh (`mesh.place`)."""
        return self.program(parameters, batch)

    def answers(self, parameters: dict, questions: Questions) -> Answers:
        """Of single places: the head is multiplied with nothing else. Parameters lie on the mesh, and questions by
        `put_questions`."""
        if questions.segment_ids_BL is not None and not self.shares_beginnings:
            raise ValueError(
                "This model, or its attention, cannot read several texts that share a beginning in one row."
            )
        return _answering(self)(parameters, questions)

    def put_questions(self, questions: Questions) -> Questions:
        """From arrays that every process has whole."""
        specs = _of_questions(questions)
        return jax.tree.map(lambda array, spec: _put(array, NamedSharding(self.mesh, spec)), questions, specs)

    @property
    def shares_beginnings(self) -> bool:
        """Whether one row of `Questions` may hold several texts that begin alike. ALiBi counts along the row, and the
        kernels for TPU know one text or another."""
        return self.model.positions == "learned" and self.compute.attention == "xla"

    @property
    def answering(self) -> jax.stages.Wrapped:
        """What `answers` runs, to be lowered where nothing is to run."""
        return _answering(self)

    def check(self, **sizes: int) -> None:
        """Can batches of this shape be read?

        Args:
            sizes: sequences of a batch and tokens of a sequence, in this order, by the names that the user gives them.

        Raises:
            InputError: the mesh does not divide them or the model, its devices have no such attention, or the model has
                learned fewer positions.
        """
        (batch_name, batch_size), (length_name, length) = sizes.items()
        device_kind = self.mesh.devices.flat[0].device_kind
        require_implementation(self.compute.attention, self.model.head_dim, device_kind)
        require_divisible(self.model, self.mesh)
        parts, places = batch_parts(self.mesh), self.mesh.shape[SEQUENCE_AXIS]
        if batch_size < 1 or batch_size % parts:
            raise InputError(
                f"{batch_name} {batch_size} cannot be divided over {parts} devices of data and fsdp: it must be a "
                f"multiple of {parts}."
            )
        if length < 1 or length % places:
            raise InputError(f"{length_name} {length} cannot be divided over mesh axis sequence of size {places}.")
        if length > self.model.longest_sequence:
            raise InputError(
                f"{length_name} is {length}, but the model has learned {self.model.max_positions} positions only."
            )


@lru_cache(maxsize=8)
def _program(likelihood: Likelihood) -> jax.stages.Wrapped:
    """Equal ones share it: a model is measured before and after training by one compiled program."""
    division = Division.of(likelihood.mesh)
    # Without a backward pass to keep them for, TPUs would compute activations again in each tile of the next product.
    compute = replace(likelihood.compute, separate_activation=True)
    structure = structure_of(likelihood.model.with_dropout(0.0), compute, division)
    isolated = likelihood.isolate_documents
    loss = make_loss(structure, compute, z_loss=0.0, isolate_documents=isolated, division=division)

    def local(parameters: dict, batch: Any) -> BatchNll:
        nll, nll_BL = loss(parameters, batch, jnp.ones((), jnp.float32), None)
        weight = batch.loss_weights_BL.sum()
        if likelihood.mesh.size > 1:
            nll, weight = (jax.lax.psum(part, EVERYWHERE) for part in (nll, weight))
        return BatchNll(nll_BL, nll, weight)

    whole = PartitionSpec()
    function = (
        on_mesh(local, likelihood.mesh, lambda _: BatchNll._make((GRID, whole, whole)))
        if likelihood.mesh.size > 1
        else local
    )
    return jax.jit(function, compiler_options=dict(likelihood.compute.compiler_options))


@lru_cache(maxsize=8)
def _answering(likelihood: Likelihood) -> jax.stages.Wrapped:
    division = Division.of(likelihood.mesh)
    compute = replace(likelihood.compute, separate_activation=True)
    structure = structure_of(likelihood.model.with_dropout(0.0), compute, division)
    dtype = jnp.dtype(compute.compute_dtype)
    places = likelihood.mesh.shape[SEQUENCE_AXIS]

    def local(parameters: dict, questions: Questions) -> Answers:
        decoder = _decoder(structure, parameters, division, dtype)
        hidden_BLD = decoder(
            questions.tokens_BL, positions_BL=questions.positions_BL, segment_ids_BL=questions.segment_ids_BL
        )
        L = hidden_BLD.shape[1]
        row_U, place_U = jnp.divmod(questions.places_U, L * places)
        place_U -= division.place(L)
        is_here_U = (place_U >= 0) & (place_U < L)
        nll_U, predicted_U = nll_and_prediction(
            hidden_BLD[row_U, jnp.clip(place_U, 0, L - 1)],
            decoder.token_embedding.embedding[...],
            questions.targets_U,
            dtype=dtype,
            vocabulary_axis=division.tensor,
            vocabulary_size=likelihood.model.vocabulary_size,
        )
        found = Answers(nll_U, predicted_U)
        if division.sequence is None:
            return found
        return jax.tree.map(lambda each: jax.lax.psum(jnp.where(is_here_U, each, 0), division.sequence), found)

    function = (
        on_mesh(local, likelihood.mesh, lambda _: Answers._make((ROWS, ROWS)), _of_questions)
        if likelihood.mesh.size > 1
        else local
    )
    return jax.jit(function, compiler_options=dict(compute.compiler_options))


def _of_questions(questions: Questions) -> Questions:
    texts = None if questions.positions_BL is None else GRID
    return Questions(GRID, ROWS, ROWS, texts, texts)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
