"""A checkpoint of ours as the harness sees a model: `loglikelihood`, `loglikelihood_rolling`, `generate_until`.

The semantics are those of its own `HFLM` (lm-eval 0.4.13, `models/huggingface.py`), against which the tests hold us:
figures are those that others publish. Two things are ours. A continuation whose tokens all merge into the context's
last one ("Ans" + "wer"), with which the harness cannot go on, is scored from the first token in which both differ. And
requests share rows where one's tokens begin the other's.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.checkpoints.format import read_files, read_metadata, resolve
from aurora_jax.data.text.tokenizer import HuggingFaceTokenizer, Tokenizer, tokenizer_of
from aurora_jax.errors import InputError
from aurora_jax.evaluate.harness.rows import batches_of, rows_of
from aurora_jax.generate.prompts import Prompt
from aurora_jax.generate.sampling import Sampling
from aurora_jax.generate.text import TextGenerator, TextSettings
from aurora_jax.model.config import ComputeConfig
from aurora_jax.model.likelihood import Likelihood
from aurora_jax.model.mesh import MeshConfig, batch_parts, make_mesh
from aurora_jax.model.sharding import parameter_shardings
from aurora_jax.storage.places import Location
from aurora_jax.storage.records import json_sha256

LONGEST = 2_048
"""Tokens that are read of a model without learned positions, as in the harness."""
NEW_TOKENS = 256
"""Of a completion whose task does not say how many, as in the harness."""

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness hands over: the texts, and the ids of context and continuation."""


class HarnessModel(TemplateLM):
    """A checkpoint for `lm_eval.simple_evaluate`.

    Args:
        checkpoint: a converted checkpoint, a stage of a run, or a run (its newest step).
        batch_tokens: tokens that are read at once, padding included.
        compute: precision; of completions, too.
        mesh: of all devices.

    Raises:
        InputError: not a checkpoint, or the mesh cannot divide the model.
    """

    def __init__(
        self,
        checkpoint: Location,
        *,
        batch_tokens: int,
        compute: ComputeConfig,
        mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.checkpoint = resolve(checkpoint)
        self.metadata = read_metadata(self.checkpoint)
        files = read_files(self.checkpoint)
        self._tokenizer = tokenizer_of(files, self.checkpoint)
        self._compute, self._batch_tokens = compute, batch_tokens
        self._likelihood = Likelihood(self.metadata.config, compute, make_mesh(mesh), isolate_documents=False)
        self._parts = batch_parts(self._likelihood.mesh)
        longest = self.metadata.config.longest_sequence
        self.max_length = LONGEST if longest == float("inf") else int(longest)
        self._likelihood.check(rows=self._parts, max_length=self.max_length)
        self._prefix = prefix_token(files, self._tokenizer)
        self._parameters: dict | None = None
        self._generator: TextGenerator | None = None
        self.merged = 0
        """Continuations whose tokens were all in the context's."""

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.sha256

    @property
    def max_gen_toks(self) -> int:
        return NEW_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Names of special tokens in a text stand for these tokens, as in `transformers`."""
        if isinstance(self._tokenizer, HuggingFaceTokenizer):
            return self._tokenizer.encode_with_special_tokens(string)
        return self._tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if continuation_ids:
            return context_ids, continuation_ids
        self.merged += 1
        whole = self.tok_encode(context + continuation)
        same = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(whole, context_ids, strict=False))
        )
        same = min(same, len(whole) - 1)
        return whole[:same] or [self.prefix_token_id], whole[same:]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        for text, _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"A continuation has {len(continuation)} tokens; the model reads 1 to {self.max_length}: {text}"
                )
        left = np.array([len(continuation) for _, continuation in pairs])
        nll, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
        with self._progress("log-likelihoods", len(pairs), disable_tqdm) as advance:
            share = self._likelihood.shares_beginnings
            rows_to_read = rows_of(pairs, self.max_length, share)
            for batch in batches_of(rows_to_read, self._batch_tokens, self._parts, share):
                answers = self._likelihood.answers(self._loaded(), self._likelihood.put_questions(batch.questions))
                nll_U, predicted_U = jax.device_get(answers)
                for index, request, token in batch.asked:
                    nll[request] += nll_U[index]
                    greedy[request] &= predicted_U[index] == token
                    left[request] -= 1
                    if not left[request]:
                        advance(1)
                        self._keep("loglikelihood", requests[request][0], (-nll[request], bool(greedy[request])))
        return [(-float(of_one), bool(is_greedy)) for of_one, is_greedy in zip(nll, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that overlap by one token; nats."""
        texts = [request.args[0] for request in requests]
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                pairs.append((None, list(context), list(continuation)))
                owners.append(number)
        found = np.zeros(len(texts))
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(pairs, disable_tqdm), strict=True):
            found[number] += value
        for text, value in zip(texts, found, strict=True):
            self._keep("loglikelihood_rolling", (text,), float(value))
        return found.tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions, up to the first of the strings that end them."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        done: dict[int, str] = {}
        with self._progress("completions", len(requests), disable_tqdm) as advance:
            for numbers in groups.values():
                settings, stop, room = self._settings(requests[numbers[0]].args[1])
                prompts = [
                    Prompt(self.tok_encode(requests[number].args[0])[-room:] or [self.prefix_token_id], [])
                    for number in numbers
                ]
                batch_size = max(1, self._batch_tokens // self.max_length)
                texts = self._generating().complete(prompts, settings, batch_size=batch_size, advance=advance)
                for number, completion in zip(numbers, itertools.chain.from_iterable(texts), strict=True):
                    done[number] = postprocess_generated_text(self._without_special(completion.text), stop, None)
                    self._keep("generate_until", requests[number].args, done[number])
        return [done[number] for number in range(len(requests))]

    def identity(self) -> str:
        """What answers follow from: the weights, the tokenizer, the precision and the length.

        Raises:
            InputError: the checkpoint has no checksums.
        """
        if self.metadata.contents is None:
            raise InputError(f"{self.checkpoint} has no checksums: whose answers were kept could not be known.")
        facts = {"checksums": self.metadata.contents.checksums, "files": self.metadata.contents.sha256}
        settings = {"compute": asdict(self._compute), "max_length": self.max_length}
        return json_sha256(json.loads(json.dumps({**facts, **settings}, default=str)))[:32]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {
            "model_name": str(self.checkpoint),
            "model_dtype": self._compute.compute_dtype,
            "step": self.metadata.step,
            "tokenizer_sha256": self._tokenizer.sha256,
            "max_length": self.max_length,
        }

    def _settings(self, arguments: Mapping[str, Any]) -> tuple[TextSettings, list[str], int]:
        """How to go on, the strings that end it, and the tokens that a prompt may have."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), NEW_TOKENS))
        stop = handle_stop_sequences(given.pop("until", None), eos=self._end_of_text())
        new_tokens = int(given.pop("max_gen_toks"))
        if (room := self.max_length - new_tokens) < 1:
            raise InputError(f"A task asks for {new_tokens} new tokens; the model reads {self.max_length} in all.")
        draws, temperature = given.pop("do_sample", False), float(given.pop("temperature", 0.0) or 0.0)
        known = {name: given.pop(name) for name in ("top_p", "top_k") if given.get(name) is not None}
        if not draws or temperature == 0:
            temperature, known = 0.0, {}
        if unknown := {name: value for name, value in given.items() if value is not None}:
            raise InputError(f"A task asks to generate with {unknown}, of which nothing is known here.")
        return TextSettings(new_tokens, Sampling(temperature, **known), tuple(filter(None, stop))), stop, room

    def _end_of_text(self) -> str:
        return self._tokenizer.special_name(self._tokenizer.eos_id) or ""

    def _without_special(self, text: str) -> str:
        """As `transformers` decodes a completion: names of special tokens are left out."""
        names = self._tokenizer.special_names if isinstance(self._tokenizer, HuggingFaceTokenizer) else ()
        for name in names:
            text = text.replace(name, "")
        return text

    def _loaded(self) -> dict:
        if self._parameters is None:
            shardings = parameter_shardings(self.metadata.config, self._likelihood.mesh)
            self._parameters = restore_parameters(self.checkpoint, dtype=jnp.float32, shardings=shardings)
        return self._parameters

    def _generating(self) -> TextGenerator:
        if self._generator is None:
            self._parameters = None
            self._generator = TextGenerator(self.checkpoint, dtype=self._compute.activation_dtype)
        return self._generator

    def _keep(self, kind: str, request: Any, answer: Any) -> None:
        """For a later start, where --resume asks for it."""
        if request is not None:
            self.cache_hook.add_partial(kind, request, answer)

    def _progress(self, what: str, total: int, quiet: bool) -> "_Bar":
        return _Bar(what, total, quiet)


class _Bar:
    """On standard error, with the time that is left."""

    def __init__(self, what: str, total: int, quiet: bool):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=quiet)
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Any:
        self._progress.start()
        return lambda count: self._progress.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def prefix_token(files: Mapping[str, bytes], tokenizer: Tokenizer) -> int:
    """What stands before a text that has no context: the tokenizer's beginning of text, or its end of text. Token 0 is
    one like others."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = json.loads(files[name]).get("bos_token") if name in files else None
        text = said.get("content") if isinstance(said, dict) else said
        if isinstance(text, str):
            return tokenizer.special_id(text)
    return tokenizer.eos_id
