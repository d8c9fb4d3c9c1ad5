#!/usr/bin/env bash
# Makes .venv beside this folder and installs the project there with the extras named as arguments:
#   bash scripts/install.sh fairseq,workflow
# A second call with nothing changed takes a moment. PYTHON names another interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:?usage: install.sh EXTRA[,EXTRA...]}
venv=$root/.venv

if [ ! -x "$venv/bin/python" ]; then
    for python in "${PYTHON:-}" python3.11 python3.12 python3; do
        if [ -n "$python" ] && "$python" -c \
            'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            break
        fi
        python=
    done
    if [ -z "$python" ]; then
        echo "error: expected Python 3.11 or 3.12, found neither; install one, or name it:" \
            "PYTHON=/path/to/python bash scripts/demo.sh" >&2
        exit 1
    fi
    echo "Making $venv with $("$python" --version)"
    "$python" -m venv "$venv.new"
    mv "$venv.new" "$venv"
    # A venv's scripts name the path it was made at, so make them again at the final one.
    "$python" -m venv --upgrade-deps "$venv" >/dev/null 2>&1 || "$python" -m venv "$venv"
fi

state=$(cat "$root/setup.py" "$root/constraints.txt" "$0" | cksum; echo "$root $extras")
stamp=$venv/installed.${extras//,/-}
if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    exit 0
fi
echo "Installing ($extras); the first time takes a few minutes"
cd "$root"
# torch first: the fairseq wheel pulls a torchaudio that would choose a torch by itself.
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt torch
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable ".[$extras]"
# The fairseq wheel requires torchaudio but imports it nowhere here; the newest one does not load
# beside every torch build, and transformers then fails to import.
"$venv/bin/python" -m pip uninstall --quiet --yes torchaudio 2>/dev/null || true
echo "$state" >"$stamp"
