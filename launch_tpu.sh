#!/usr/bin/env bash
# Runs `aurora train` on TPU pods and on machines that are reached by ssh. `./launch_tpu.sh --help` explains it.
#
# What it does is in aurora_jax/launch: the standard library of Python 3.10 or later, which TPU VMs have before anything is installed. This
# file finds such a Python and hands over, on the machine where it is called and on the hosts (`on-host`).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for PYTHON in "$ROOT/.venv/bin/python" "$ROOT/../venv/bin/python" python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
  if "$PYTHON" -I -S -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    exec "$PYTHON" -I -S "$ROOT/aurora_jax/launch/__main__.py" "$@"
  fi
done
echo "error: $(hostname) has no Python 3.10 or later on its PATH, which launch_tpu.sh needs" >&2
exit 2
