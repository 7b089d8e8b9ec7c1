"""A run that cannot be is refused in one sentence, before anything is read."""

import json
from pathlib import Path

from eight_devices import run_on_eight_devices

WORKER = Path(__file__).with_name("refused_runs.py")
CASES = [
    (["--data.batch-size", "12"], {}, "data.batch_size 12 cannot be divided over 8 devices"),
    (["--optimizer.micro-batches", "4"], {}, "in 4 micro-batches: it must be a multiple of 32"),
    (["--evaluation.batch-size", "4"], {}, "evaluation.batch_size 4 cannot be divided over 8 devices"),
    (["--mesh.tensor", "8"], {}, "heads 4 cannot be divided over mesh axis tensor of size 8"),
    (
        ["--mesh.tensor", "4"],
        {"vocabulary": 510},
        "vocabulary_size 510 cannot be divided over mesh axis tensor of size 4",
    ),
    (["--mesh.tensor", "2"], {"mlp": 60}, "mlp_width 60 cannot be divided over mesh axis tensor x fsdp of size 8"),
    ([], {"width": 36}, "width 36 cannot be divided over mesh axis fsdp of size 8"),
    (["--mesh.sequence", "2", "--data.sequence-length", "15"], {}, "data.sequence_length 15 cannot be divided"),
    (["--data.sequence-length", "17"], {}, "data.sequence_length is 17, but the model has learned 16 positions"),
    (["--mesh.fsdp", "3"], {}, "does not fit 8 devices"),
    (["--optimizer.micro-batches", "0"], {}, "optimizer.micro_batches is 0"),
    (["--data.batch-size", "0"], {}, "data.batch_size 0"),
    (
        ["--compute.attention", "flash"],
        {},
        "compute.attention flash runs on TPU v4, v5e, v5p, v6e, and the devices here",
    ),
    (
        ["--compute.attention", "flash_interpreted"],
        {"width": 1056},
        "heads of up to 256 dimensions, and the model's have",
    ),
    (["--compute.attention", "flash", "--dropout", "0.1"], {}, "flash has no dropout"),
    (["--stages.0.learning-rate.warmup-steps", "9"], {}, "warmup"),
]


def test_a_run_that_cannot_be_is_refused_before_anything_is_read(tmp_path):
    """None of the files that the config names exists: the first that is looked for would be another error."""
    done = run_on_eight_devices(WORKER, tmp_path, json.dumps([(flags, sizes) for flags, sizes, _ in CASES]))
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(CASES)
    for (flags, sizes, message), each in zip(CASES, found, strict=True):
        assert (each["status"], each["left"]) == (2, []), (flags, sizes, each)
        assert message in " ".join(each["said"].split()), (flags, sizes, each)
        assert "Traceback" not in each["said"]
