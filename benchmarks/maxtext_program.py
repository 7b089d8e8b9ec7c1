"""Compiles MaxText's training step and keeps its program: run by `plan_vs_maxtext.py --run-maxtext`, in
MaxText's own environment.

    PYTHON benchmarks/maxtext_program.py OUTPUT.hlo key=value ...      # the keys of MaxText's own configuration

Writes the optimized HLO to OUTPUT.hlo, and its peak memory in bytes and the seconds of compiling to OUTPUT.hlo.json.
"""

import json
import runpy
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import jax

MODULE = "maxtext.trainers.pre_train.train_compile"


def main(output: Path, settings: list[str]) -> None:
    compile_lowered = jax.stages.Lowered.compile
    output.unlink(missing_ok=True)

    def compile_and_keep(self, *arguments, **options):
        begun = time.monotonic()
        compiled = compile_lowered(self, *arguments, **options)
        text = compiled.as_text() or ""
        # MaxText compiles small programs too: the step is the longest.
        if not output.exists() or len(text) > output.stat().st_size:
            output.write_text(text)
            memory = compiled.memory_analysis()
            facts = {"peak": memory.peak_memory_in_bytes, "seconds": time.monotonic() - begun}
            output.with_name(output.name + ".json").write_text(json.dumps(facts))
        return compiled

    jax.stages.Lowered.compile = compile_and_keep  # type: ignore[method-assign]
    spec = find_spec("maxtext")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    base = next(Path(next(iter(spec.submodule_search_locations))).rglob("configs/base.yml"))
    sys.argv = [MODULE, str(base), *settings]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
