"""What a run computes: one object for `train`, which runs it, and for `plan`, which only compiles it.

B batch, L sequence.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.data.batches.loader import Batch
from aurora_jax.errors import InputError
from aurora_jax.model.config import ModelConfig
from aurora_jax.model.decoder import initial_parameters, structure_of
from aurora_jax.model.division import Division
from aurora_jax.model.likelihood import GRID, ROWS, Likelihood, make_loss
from aurora_jax.model.mesh import batch_parts
from aurora_jax.model.sharding import nest, parameter_shapes, parameter_shardings
from aurora_jax.train.config import TrainConfig
from aurora_jax.train.optimizer import adamw
from aurora_jax.train.stages import learning_rate_schedule
from aurora_jax.train.state import TrainState, initial_state
from aurora_jax.train.step import make_gradient, make_train_step


@dataclass(frozen=True)
class Program:
    """The compiled functions of a run and the shapes of its state. Nothing is compiled or allocated before it is used.

    Args:
        config: the run.
        model: its model; dropout is the config's.
        mesh: of this run's devices, or of a topology that is only compiled for.
        tasks: of the mixtures, for the step's metrics (T).
    """

    config: TrainConfig
    model: ModelConfig
    mesh: Mesh
    tasks: int = 1

    @cached_property
    def step(self) -> jax.stages.Wrapped:
        """`step(state, batch) -> (state, metrics)`; see `make_train_step`.

        The state comes out where it went in, so its memory is used again and the second step is the program
        of the first.
        """
        config, compute, division = self.config, self.config.compute, Division.of(self.mesh)
        loss = make_loss(
            structure_of(self.model.with_dropout(config.dropout), compute, division),
            compute,
            z_loss=config.optimizer.z_loss,
            isolate_documents=self.likelihood.isolate_documents,
            division=division,
        )
        gathered_once = compute.compute_dtype if config.mesh.gather == "step" else None
        step = make_train_step(
            make_gradient(loss, config.optimizer.micro_batches, self.mesh, gathered_once),
            config.optimizer,
            learning_rate_schedule(config.stages),
            dropout=config.dropout > 0,
            seed=config.seed,
            tasks=self.tasks,
            stage_starts=[end for end in config.ends if end < config.steps],
        )
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(self._shardings, NamedSharding(self.mesh, PartitionSpec())),
            compiler_options=dict(compute.compiler_options),
        )

    @cached_property
    def pass_over(self) -> jax.stages.Wrapped:
        """`pass_over(state) -> state`, one step further, nothing else changed."""

        def pass_over(state: TrainState) -> TrainState:
            return state._replace(step=state.step + 1)

        return jax.jit(pass_over, donate_argnums=0, out_shardings=self._shardings)

    @cached_property
    def likelihood(self) -> Likelihood:
        """Of held-out text, read as the step reads its batches."""
        isolate_documents = not self.config.data.attend_across_documents
        return Likelihood(self.model, self.config.compute, self.mesh, isolate_documents)

    @cached_property
    def shapes(self) -> TrainState:
        """The state as shapes with shardings: parameters by the table, moments like their parameters, scalars
        everywhere."""
        optimizer = self.config.optimizer
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def placed(shape: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        def everywhere(shape: Any) -> Any:
            return placed(shape, replicated)

        shardings = parameter_shardings(self.model, self.mesh)
        parameters = jax.tree.map(placed, nest(parameter_shapes(self.model)), shardings)
        state = jax.eval_shape(partial(initial_state, optimizer=optimizer), parameters)
        moments = optax.tree_map_params(
            adamw(optimizer), placed, state.moments, shardings, transform_non_params=everywhere
        )
        return TrainState(parameters, moments, *jax.tree.map(everywhere, tuple(state[2:])))

    @property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda shape: shape.sharding, self.shapes)

    @cached_property
    def random_state(self) -> jax.stages.Wrapped:
        """The program, without arguments, of a state with random weights: each device draws its own part."""

        def random_state() -> TrainState:
            return initial_state(initial_parameters(self.model, self.config.seed), self.config.optimizer)

        return jax.jit(random_state, out_shardings=self._shardings)

    @cached_property
    def state_around(self) -> jax.stages.Wrapped:
        """The program of a fresh state around weights that lie on the mesh already; it takes their memory over.

        Without stated shardings the compiler makes the moments, which are zeros and depend on nothing, whole on every
        device.
        """
        function = partial(initial_state, optimizer=self.config.optimizer)
        return jax.jit(function, out_shardings=self._shardings, donate_argnums=0)

    def batch_shapes(self, batch_size: int) -> Batch:
        """A global batch of the run's sequences as shapes: rows over data and fsdp, places over `sequence`."""
        grid = (batch_size, self.config.data.sequence_length)

        def struct(dtype: Any, *shape: int) -> Any:
            sharding = NamedSharding(self.mesh, GRID if len(shape) == 2 else ROWS)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        return Batch(
            tokens_BL=struct(jnp.int32, *grid),
            targets_BL=struct(jnp.int32, *grid),
            loss_weights_BL=struct(jnp.float32, *grid),
            segment_ids_BL=struct(jnp.int32, *grid),
            positions_BL=struct(jnp.int32, *grid),
            task_ids_B=struct(jnp.int32, batch_size),
        )

    def lower_step(self) -> jax.stages.Lowered:
        """The step, traced; `.compile()` asks the compiler of the mesh's devices."""
        return self._lowered(self.step, self.shapes, self.batch_shapes(self.config.data.batch_size))

    def lower_likelihood(self) -> jax.stages.Lowered:
        """The likelihood of a batch of evaluation, traced."""
        batch = self.batch_shapes(self.config.evaluation.batch_size)
        return self._lowered(self.likelihood.program, self.shapes.parameters, batch)

    def _lowered(self, program: jax.stages.Wrapped, *shapes: Any) -> jax.stages.Lowered:
        """In the mesh's context, from which kernels know their chip. The shapes are made outside: optax makes a small
        array on the way, which no absent TPU can hold."""
        with jax.set_mesh(self.mesh):
            return program.lower(*shapes)

    def check(self) -> None:
        """Can this be run: does the mesh divide the model and the batches, can the model read them? Nothing
        is compiled.

        Raises:
            InputError: it cannot, in one sentence.
        """
        learning_rate_schedule(self.config.stages)
        if self.config.dropout and self.config.compute.attention != "xla":
            raise InputError(
                f"compute.attention {self.config.compute.attention} has no dropout (dropout "
                f"{self.config.dropout}): set "
                "dropout to 0, or choose attention xla."
            )
        data, parts, micro_batches = self.config.data, batch_parts(self.mesh), self.config.optimizer.micro_batches
        if data.batch_size % (parts * micro_batches):
            raise InputError(
                f"data.batch_size {data.batch_size} cannot be divided over {parts} devices of data and fsdp in "
                f"{micro_batches} micro-batches: it must be a multiple of {parts * micro_batches}."
            )
        batches = {"data": data.batch_size}
        if self.config.evaluation.tasks:
            batches["evaluation"] = self.config.evaluation.batch_size
        for group, size in batches.items():
            self.likelihood.check(**{f"{group}.batch_size": size, "data.sequence_length": data.sequence_length})
