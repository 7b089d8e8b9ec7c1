"""Do two models compute the same? Any mix of Hugging Face folders and our checkpoints, both in fp32.

L sequence, V vocabulary.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from rich.console import Console
from rich.table import Table
from scipy.special import log_softmax

from aurora_jax.checkpoints.arrays import restore_parameters
from aurora_jax.checkpoints.format import is_checkpoint, read_files, read_metadata
from aurora_jax.data.text.tokenizer import tokenizer_of
from aurora_jax.data.text.tokenizer_files import gpt2_tokenizer_json, kind_of, tokenizer_sha256
from aurora_jax.errors import InputError
from aurora_jax.model.config import ComputeConfig, ModelConfig
from convert.from_torch import check_tensors, check_tied_head
from convert.source import HuggingFaceFolder, read_folder
from convert.travelling import travelling_files

WINDOW = 512
"""Tokens that are read at a time; fewer where a model has learned fewer positions."""

RANDOM_TOKENS = 1024
SEED = 0

DEFAULT_TEXT = """\
The quick brown fox jumps over the lazy dog. Language models assign a probability to every next token.
Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.
सभी मनुष्य जन्म से स्वतंत्र हैं और गरिमा तथा अधिकारों में समान हैं।
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.
def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
"""

Logits = Callable[[np.ndarray], np.ndarray]
"""Tokens [L] to logits [L, V], fp32."""


@dataclass(frozen=True)
class Agreement:
    """How far model B is from model A, over all tokens that were read."""

    tokens: int
    top1: float
    """Share of positions where both rank the same token first."""
    top5: float
    """Mean share of A's five best tokens that are among B's five best."""
    mean_kl: float
    """KL(A || B) a position, in nats."""
    max_kl: float
    max_logit_difference: float


def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    text: Path | None = None,
    max_kl: float = 1e-4,
    console: Console | None = None,
    *,
    weights: tuple[str | None, str | None] = (None, None),
) -> bool:
    """Runs both models on a text and prints how far they agree.

    Args:
        a: Hugging Face folder, checkpoint or run directory: the reference.
        b: the same, for the model that is judged.
        text: UTF-8 file; a built-in text in five languages and Python by default.
        max_kl: greatest KL(A || B) at any position, in nats, that still passes.
        console: where the table goes; standard output by default.
        weights: of a and b, the weight file or index where a folder has several: see `choose_weights`.

    Returns:
        Whether they agree. Not-a-number never does.

    Raises:
        InputError: a path that is no model, a text that cannot be read, models that differ in vocabulary or tokenizer.
    """
    console = console or Console()
    model_a, model_b = (_opened(path, file) for path, file in zip((a, b), weights, strict=True))
    config_a, config_b = model_a.config, model_b.config
    if config_a.vocabulary_size != config_b.vocabulary_size:
        raise InputError(
            f"{a} has a vocabulary of {config_a.vocabulary_size} tokens, {b} of {config_b.vocabulary_size}: "
            "nothing to compare."
        )
    tokens_L, origin = _tokens(a, b, text, config_a.vocabulary_size)
    window = int(min(WINDOW, config_a.longest_sequence, config_b.longest_sequence))
    logits_a, logits_b = _logits(model_a), _logits(model_b)
    windows = [tokens_L[start : start + window] for start in range(0, len(tokens_L), window)]
    agreement = compare(logits_a, logits_b, windows)
    passed = bool(agreement.max_kl <= max_kl)
    nats = {
        name: np.concatenate([logits.nats(tokens_L) for tokens_L in windows if len(tokens_L) > 1], axis=1).mean(axis=1)
        for name, logits in (("A", logits_a), ("B", logits_b))
        if isinstance(logits, _OurModel) and len(windows[0]) > 1
    }
    passed &= all(bool(abs(each[0] - each[1]) <= 1e-4 * each[0]) for each in nats.values())
    table = Table("A against B", "", title=f"A: {a}\nB: {b}", title_justify="left")
    table.add_row("tokens compared", f"{agreement.tokens:,} ({origin})")
    table.add_row("top-1 agreement", f"{agreement.top1:.3%}")
    table.add_row("top-5 agreement", f"{agreement.top5:.3%}")
    table.add_row("mean KL(A || B), nats", f"{agreement.mean_kl:.3e}")
    table.add_row("max KL(A || B), nats", f"{agreement.max_kl:.3e} ({'within' if passed else 'beyond'} {max_kl:g})")
    table.add_row("max logit difference", f"{agreement.max_logit_difference:.3e}")
    for name, (by_logits, by_likelihood) in nats.items():
        table.add_row(f"nats a token of {name}", f"{by_logits:.5f}; as training counts, {by_likelihood:.5f}")
    console.print(table)
    return passed


def compare(logits_a: Logits, logits_b: Logits, windows: list[np.ndarray]) -> Agreement:
    """Agreement of two models over windows of tokens, each [L]."""
    top1, top5, divergences, differences = [], [], [], []
    for tokens_L in windows:
        a_LV, b_LV = logits_a(tokens_L).astype(np.float64), logits_b(tokens_L).astype(np.float64)
        log_a_LV, log_b_LV = log_softmax(a_LV, axis=-1), log_softmax(b_LV, axis=-1)
        divergences.append(np.sum(np.exp(log_a_LV) * (log_a_LV - log_b_LV), axis=-1))
        differences.append(np.max(np.abs(a_LV - b_LV)))
        best = min(5, a_LV.shape[-1])
        best_a, best_b = (np.argsort(-values_LV, axis=-1, kind="stable")[:, :best] for values_LV in (a_LV, b_LV))
        top1.append(best_a[:, 0] == best_b[:, 0])
        top5.append(np.mean(np.any(best_a[:, :, None] == best_b[:, None, :], axis=-1), axis=-1))
    divergence_L = np.concatenate(divergences)
    return Agreement(
        tokens=len(divergence_L),
        top1=float(np.mean(np.concatenate(top1))),
        top5=float(np.mean(np.concatenate(top5))),
        mean_kl=float(np.mean(divergence_L)),
        max_kl=float(np.max(divergence_L)),
        max_logit_difference=float(np.max(differences)),
    )


def _is_ours(path: str | os.PathLike[str]) -> bool:
    """A folder with `config.json` is Hugging Face's; anything else must resolve to one of our checkpoints."""
    return is_checkpoint(path) or not (Path(path) / "config.json").is_file()


@dataclass(frozen=True)
class _Checkpoint:
    """One of our checkpoints, nothing of it loaded."""

    path: str | os.PathLike[str]
    config: ModelConfig


def _opened(path: str | os.PathLike[str], weights: str | None) -> _Checkpoint | HuggingFaceFolder:
    if _is_ours(path):
        if weights is not None:
            raise InputError(
                f"{path} is one of our checkpoints, which has one set of weights: {weights} cannot be chosen."
            )
        return _Checkpoint(path, read_metadata(path).config)
    folder = read_folder(path, weights)
    check_tensors(folder)
    check_tied_head(folder)
    return folder


def _logits(model: _Checkpoint | HuggingFaceFolder) -> Logits:
    return _OurModel(model) if isinstance(model, _Checkpoint) else _hf_model(model)


class _OurModel:
    """One of our checkpoints on the first device, in fp32."""

    def __init__(self, model: _Checkpoint):
        import jax

        from aurora_jax.model.decoder import merge, structure_of
        from aurora_jax.model.likelihood import Likelihood
        from aurora_jax.model.mesh import MeshConfig, make_mesh

        compute = ComputeConfig(compute_dtype="float32", activation_dtype="float32")
        structure = structure_of(model.config, compute)
        self._parameters = restore_parameters(model.path, dtype="float32")
        self._tokens = model.config.vocabulary_size
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
        self._likelihood = Likelihood(model.config, compute, mesh, isolate_documents=False)

        @jax.jit
        def logits_1LV(parameters: dict, tokens_1L: jax.Array) -> jax.Array:
            decoder = merge(structure, parameters)
            return decoder.logits(decoder(tokens_1L))

        self._logits_1LV = logits_1LV

    def __call__(self, tokens_L: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits_1LV(self._parameters, tokens_L[None]))[0, :, : self._tokens]

    def nats(self, tokens_L: np.ndarray) -> np.ndarray:
        """Negative log-likelihoods [2, L - 1] of all tokens but the first: of the logits, and as training has them."""
        from aurora_jax.data.batches.loader import Batch

        inputs_1L, targets_1L = tokens_L[None, :-1], tokens_L[None, 1:]
        log_LV = log_softmax(self(tokens_L[:-1]).astype(np.float64), axis=-1)
        ones_1L = np.ones_like(inputs_1L)
        batch = Batch(inputs_1L, targets_1L, ones_1L.astype(np.float32), ones_1L, ones_1L, ones_1L[:, 0])
        nll_1L = np.asarray(self._likelihood(self._parameters, batch).token_nll_BL, np.float64)
        return np.stack([-np.take_along_axis(log_LV, targets_1L.T, axis=1)[:, 0], nll_1L[0]])


def _hf_model(folder: HuggingFaceFolder) -> Logits:
    """The model that `transformers` makes of the tensors that a conversion would read, loaded by PyTorch and
    safetensors."""
    try:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoConfig, BloomForCausalLM, GPTBigCodeForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise InputError(
            f"{folder.path}: running a Hugging Face model takes PyTorch: pip install 'aurora-jax[torch]'."
        ) from None
    disable_progress_bar()
    loaded = {
        file: load_file(file)
        if file.suffix == ".safetensors"
        else torch.load(file, map_location="cpu", weights_only=True)
        for file in folder.files
    }
    state = {name: loaded[stored.file][stored.name] for name, stored in folder.tensors.items()}
    classes: dict[str, Any] = {"gpt_bigcode": GPTBigCodeForCausalLM, "bloom": BloomForCausalLM}
    model, report = classes[folder.hf_config["model_type"]].from_pretrained(
        None,
        config=AutoConfig.from_pretrained(folder.path),
        state_dict=state,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if wrong := {problem: sorted(map(str, names)) for problem, names in report.items() if names}:
        raise InputError(f"{folder.path}: transformers cannot load all of the model: {str(wrong)[:400]}.")
    model.eval()

    def logits_LV(tokens_L: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(tokens_L.astype(np.int64))[None]).logits[0].numpy()

    return logits_LV


def _tokens(
    a: str | os.PathLike[str], b: str | os.PathLike[str], text: Path | None, vocabulary_size: int
) -> tuple[np.ndarray, str]:
    """Tokens [L] of the text, or random ones if neither model has a tokenizer, and where they are from."""
    try:
        content, origin = (text.read_text(encoding="utf-8"), text.name) if text else (DEFAULT_TEXT, "built-in text")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text} cannot be read as UTF-8 text: {error}.") from error
    files = {path: read_files(path) if _is_ours(path) else travelling_files(Path(path))[0] for path in (a, b)}
    digests = {
        path: digest
        for path, its_files in files.items()
        if (digest := tokenizer_sha256(its_files, Path(path))) is not None
    }
    if not digests:
        if text:
            raise InputError(f"Neither {a} nor {b} has a tokenizer: {text} cannot be read as tokens.")
        random_L = np.random.default_rng(SEED).integers(vocabulary_size, size=RANDOM_TOKENS, dtype=np.int32)
        return random_L, f"random, seed {SEED}: no tokenizer"
    path = next(iter(digests))
    one_of_each = {
        digest: path for path, digest in reversed(digests.items())
    }  # equal tokenizers need not be asked twice
    tokens = {path: _encode(files[path], path, content) for path in one_of_each.values()}
    if any(ids != tokens[path] for ids in tokens.values()):
        raise InputError(
            f"{a} has the tokenizer {digests[a][:12]}, {b} has {digests[b][:12]}, and they read the {origin} "
            "as other tokens: "
            "these are not the same model."
        )
    if not tokens[path]:
        raise InputError(f"{origin}: no tokens to compare.")
    if max(tokens[path]) >= vocabulary_size:
        raise InputError(
            f"{path}: its tokenizer yields the token {max(tokens[path])}, its model has only {vocabulary_size}."
        )
    return np.asarray(tokens[path], np.int32), origin


def _encode(files: Mapping[str, bytes], where: str | os.PathLike[str], text: str) -> list[int]:
    """The tokens of a text; unlike to train or to generate, this takes no end-of-text token."""
    kind = kind_of(files, Path(where))
    if kind not in ("tokenizer.json", "vocab.json"):
        return tokenizer_of(files, Path(where)).encode(text)
    definition = (
        gpt2_tokenizer_json(files, Path(where))
        if kind == "vocab.json"
        else files[kind].decode("utf-8", errors="replace")
    )
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{where}: not a tokenizer.json of the `tokenizers` library: {error}") from error
    tokenizer.no_truncation()
    return tokenizer.encode(text, add_special_tokens=False).ids
