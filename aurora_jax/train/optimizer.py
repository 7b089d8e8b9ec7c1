"""AdamW for the decoder's parameters; the learning rate is the step function's business."""

import jax
import jax.numpy as jnp
import optax

from aurora_jax.model.sharding import flatten, nest
from aurora_jax.train.config import OptimizerConfig


def decays(path: str) -> bool:
    """Whether weight decay applies to a parameter: matrices and embeddings, not biases and LayerNorm."""
    return path.endswith(("kernel", "embedding"))


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction plus decoupled decay, to be multiplied by minus the learning rate.

    The rate is left out so that it follows the run's step, not the number of updates made: a skipped update
    does not shift the schedule.
    """
    return optax.chain(
        _adam(config),
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: nest({path: decays(path) for path in flatten(tree)})
        ),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam whose moments are computed in fp32 and kept in the precision that the config asks for."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)

    def kept_in(state, dtype):
        mu, nu = (jax.tree.map(lambda moment: moment.astype(dtype), moments) for moments in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(gradients, state, parameters=None):
        direction, state = adam.update(gradients, kept_in(state, jnp.float32), parameters)
        return direction, kept_in(state, config.moments_dtype)

    return optax.GradientTransformation(lambda parameters: kept_in(adam.init(parameters), config.moments_dtype), update)


def clip(gradients: dict, norm: jax.Array, largest: float) -> dict:
    """Gradients scaled so that their global norm, given as `norm`, is at most `largest` (Pascanu et al. 2013,
    arXiv 1211.5063)."""
    scale = jnp.minimum(1.0, largest / jnp.maximum(norm, 1e-12))
    return nest({path: gradient * scale.astype(gradient.dtype) for path, gradient in flatten(gradients).items()})
