"""Tasks of the harness on a CPU: our models in it against its own `--model hf`, on the same weights and requests.

    python benchmarks/evaluate_cpu.py --task-data DIR [--model examples/nano] [--rounds 3] [--json FILE]

DIR has the files that the tasks aurora_... read. Both answer the very same requests, in fp32, with the batch that is
best for each; figures are compared. Times are of all requests of a kind, tokenizing included, without reading the
weights; compiling is counted in the first round, which is said beside the median of the others.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "true"}

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from aurora_jax.evaluate.harness.model import HarnessModel
from aurora_jax.evaluate.harness.run import TASKS
from aurora_jax.model.config import ComputeConfig
from convert.from_torch import from_torch

CHOICES = ("aurora_xcopa_vi", "aurora_jcommonsenseqa", "aurora_winograd_en", "aurora_winograd_jp")
TARGET = 3.0


class Recorder(LM):
    """A model that keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Instance] = []

    def loglikelihood(self, requests):
        self.asked = list(requests)
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


def timed(function, requests) -> tuple[float, list]:
    begun = time.perf_counter()
    answers = function(requests, disable_tqdm=True)
    return time.perf_counter() - begun, answers


def best(make, sizes, kind: str, requests) -> tuple[object, int]:
    """The model of the batch size that answers some of the requests quickest."""
    some = requests[:: max(1, len(requests) // 256)]
    times = {}
    for size in sizes:
        model = make(size)
        timed(getattr(model, kind), some)
        times[size], _ = timed(getattr(model, kind), some)
    size = min(times, key=times.__getitem__)
    return make(size), size


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--task-data", type=Path, required=True)
    options.add_argument("--model", type=Path, default=Path(__file__).resolve().parents[1] / "examples" / "nano")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    recorder = Recorder()
    metadata = {"data": str(given.task_data)}
    manager = TaskManager(include_path=[str(TASKS)], include_defaults=False, metadata=metadata)
    simple_evaluate(recorder, tasks=list(CHOICES), task_manager=manager, bootstrap_iters=0, log_samples=False)
    texts = sorted({request.args[0] for request in recorder.asked})
    rolling = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts[:1000]) if text]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        from_torch(given.model, checkpoint)
        fp32 = ComputeConfig("float32", "float32", unroll_layers=True)
        length = HarnessModel(checkpoint, batch_tokens=1, compute=fp32).max_length
        print(f"{'':24} {'requests':>9} {'ours':>9} {'first':>9} {'hf':>9} {'ratio':>7}   batches")
        for kind, requests in (("loglikelihood", recorder.asked), ("loglikelihood_rolling", rolling)):
            ours, our_size = best(
                lambda size: HarnessModel(checkpoint, batch_tokens=size, compute=fp32),
                (1_024, 2_048, 4_096, 8_192),
                kind,
                requests,
            )
            theirs, their_size = best(
                lambda size: HFLM(
                    pretrained=str(given.model), device="cpu", dtype="float32", batch_size=size, max_length=length
                ),
                (1, 4, 8, 16, 32),
                kind,
                requests,
            )
            first, answers = timed(getattr(ours, kind), requests)
            rounds = [
                (timed(getattr(ours, kind), requests)[0], timed(getattr(theirs, kind), requests))
                for _ in range(given.rounds)
            ]
            mine = statistics.median(seconds for seconds, _ in rounds)
            peer = statistics.median(seconds for _, (seconds, _) in rounds)
            ratio = peer / mine
            expected = rounds[0][1][1]
            values, expected_values = (np.asarray(each, np.float64) for each in (answers, expected))
            np.testing.assert_allclose(values, expected_values, rtol=1e-4, atol=1e-2)
            print(
                f"{kind:24} {len(requests):>9,} {mine:>8.2f}s {first:>8.2f}s {peer:>8.2f}s {ratio:>6.2f}x   "
                f"{our_size:,} tokens; {their_size} rows"
            )
            results.append(
                {
                    "name": f"{kind}, {len(requests):,} requests of {given.model.name}",
                    "ours": mine,
                    "peer": peer,
                    "unit": "s",
                    "ratio": ratio,
                    "target": TARGET,
                    "met": ratio >= TARGET,
                }
            )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {given.rounds} rounds")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
