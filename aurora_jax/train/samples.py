"""Continuations that a run writes while it trains, for people to read.

The prompts and the draws are the same each time, so that what changes is the model.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aurora_jax.data.text.tokenizer import Tokenizer
from aurora_jax.generate.generator import Generator, Programs, check_prompts, make_inference_mesh
from aurora_jax.generate.prompts import continuation
from aurora_jax.generate.sampling import Sampling
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.train.config import EvaluationConfig

SAMPLING = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
"""A small model's best tokens go round in circles."""


class Sampler:
    """Goes on with the prompts of a run; nothing to do where it has none.

    Args:
        evaluation: the run's.
        mesh: the run's.
        tokenizer: the run's.
        eos_ids: tokens that end a text.

    Raises:
        InputError: a prompt is empty, or too long for the model with its new tokens.
    """

    def __init__(
        self,
        evaluation: EvaluationConfig,
        model: ModelConfig,
        compute: ComputeConfig,
        mesh: Mesh,
        tokenizer: Tokenizer,
        eos_ids: tuple[int, ...],
    ):
        self._written = evaluation.prompts
        self._prompts = [continuation(tokenizer, text) for _, text in evaluation.prompts]
        self._new_tokens = evaluation.max_new_tokens
        if self._prompts:
            limits = [self._new_tokens] * len(self._prompts)
            check_prompts(model, [prompt.tokens for prompt in self._prompts], limits)
        self._model = model.with_dropout(0.0)
        self._compute = ComputeConfig(compute.compute_dtype, compute.activation_dtype, compute.attention)
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        self._lacking = [i for i in range(model.vocabulary_size) if not tokenizer.has(i) and i not in eos_ids]
        self._mesh = mesh
        if mesh.size > 1:
            # In the training mesh's own order of devices: one program then takes weights from one to the other.
            self._mesh = make_inference_mesh(self._model, list(mesh.devices.flat))
        self._programs = Programs(self._model, self._compute, self._mesh if mesh.size > 1 else None)
        self._inference_weights = InferenceWeights(self._programs)

    def __call__(self, parameters: dict) -> list[dict[str, str]]:
        """The continuations with the parameters of a train state, which stay as they are: language, prompt,
        continuation. All processes of a run take part."""
        if not self._prompts:
            return []
        with jax.set_mesh(self._mesh), jax.transfer_guard("allow"):
            weights = self._inference_weights(parameters)
            generator = Generator(self._model, weights, self._compute, self._mesh, self._programs)
            completions = generator(
                [prompt.tokens for prompt in self._prompts],
                self._new_tokens,
                sampling=SAMPLING,
                eos_ids=self._eos_ids,
                excluded_ids=self._lacking,
            )
        return [
            {
                "language": language,
                "prompt": text,
                "continuation": self._tokenizer.decode_behind(prompt.context, completion.tokens),
            }
            for (language, text), prompt, completion in zip(self._written, self._prompts, completions, strict=True)
        ]


class InferenceWeights:
    """Copies a train state's weights for a generator's programs: fp32 in parts along all axes of a training mesh become
    the precision of activations, divided over `tensor` alone (of StarCoderPlus on a pod a sixteenth, 2 GB a chip).

    A layer at a time is gathered whole, and each device keeps its part: beside the copy, a chip needs the room of one
    layer (0.8 GB), however large the model is.
    """

    def __init__(self, programs: Programs):
        whole = None if programs.mesh is None else NamedSharding(programs.mesh, PartitionSpec())

        def gathered(array: jax.Array) -> jax.Array:
            array = array.astype(programs.compute.activation_dtype)
            return array if whole is None else jax.lax.with_sharding_constraint(array, whole)

        def copied(tree: dict) -> dict:
            return jax.tree.map(gathered, tree)

        def layer(stacked: dict, index: jax.Array) -> dict:
            return copied(jax.tree.map(lambda array: array[index], stacked))

        specs = programs.parameters_spec()
        (layer_spec, *_) = specs.pop("layers")
        self.layer = jax.jit(layer, out_shardings=self._placed(programs.mesh, layer_spec))
        self.outside = jax.jit(copied, out_shardings=self._placed(programs.mesh, specs))

    def __call__(self, parameters: dict) -> dict:
        """`decoding.unstacked` of a copy; the parameters stay as they are."""
        outside = {name: tree for name, tree in parameters.items() if name != "layers"}
        layers = range(len(jax.tree.leaves(parameters["layers"])[0]))
        return {
            **self.outside(outside),
            "layers": [self.layer(parameters["layers"], jnp.int32(index)) for index in layers],
        }

    @staticmethod
    def _placed(mesh: Mesh | None, specs: dict) -> dict | None:
        if mesh is None:
            return None
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
