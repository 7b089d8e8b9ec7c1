import sys

from aurora_jax.cli import main

sys.exit(main())
