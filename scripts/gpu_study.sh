#!/usr/bin/env bash
# The language-model study on one machine with a GPU and no network: see gpu_study.py --help.
# $PYTHON (default: python3) needs what setup.py names, but not the project itself.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/scripts/pipeline/gpu_study.py" "$@"
