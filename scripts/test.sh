#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; arguments go to pytest:
#   bash scripts/test.sh              the default tests, some minutes on two cores
#   bash scripts/test.sh --slow       the long ones too
#   bash scripts/test.sh --gpu        those with a GPU side, on the GPU
#   bash scripts/test.sh -n 0         in one process; -n 8 in eight
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/install.sh" fairseq,llm,workflow,dev
cd "$root"
# One thread a process: the models of the tests are small, and threads would only wait.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec .venv/bin/python -m pytest \
    -n 2 --dist worksteal "$@"
