"""`launch_tpu.sh` runs this file by its path, in Python's isolated mode (-I): only what it adds here is found."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aurora_jax.launch.command_line import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
