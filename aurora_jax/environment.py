"""What must be said to JAX and TensorFlow before either is imported."""

import glob
import logging
import os
import warnings

ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
"""Device files of TPUs (two kinds of driver), and of GPUs of NVIDIA (WSL too) and AMD."""


def prepare() -> None:
    """Sets the environment variables that are not set: no start-up notes of TensorFlow, and no search for a TPU where
    there is none. Of absl, which Orbax warns through, only errors are heard, and nothing of widgets that a notebook
    does without."""
    # TensorFlow (SeqIO's) and absl log notes that mean nothing here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if not any(glob.glob(pattern) for pattern in ACCELERATORS):
        # Where libtpu is installed to plan with, JAX would look for a TPU, and complain.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of metadata that plain arrays do not have
    for hint in ('install "ipywidgets"', "IProgress not found"):  # rich's and tqdm's
        warnings.filterwarnings("ignore", hint)
