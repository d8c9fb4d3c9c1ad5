#!/usr/bin/env bash
# Everything that a GPU can say of this project, in a few minutes, without a network:
#   bash scripts/gpu_check.sh --output FOLDER [--minutes 8]
# The tests with a GPU side, then the benchmarks of the criterions, of whole trainings and of language
# models, each within its share of the time; what is measured by then is written all the same.
# Results and logs come to FOLDER/DEVICE. Needs fairseq and torch (and transformers, for language
# models) importable by python3, or by PYTHON; this project need not be installed. Without a GPU all
# runs at the smallest size.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() {
    echo "usage: bash scripts/gpu_check.sh --output FOLDER [--minutes 8]" >&2
    exit 2
}
output='' minutes=8
while [ $# -gt 0 ]; do
    case $1 in
        --output) output=${2:-} ;;
        --minutes) minutes=${2:-} ;;
        *) usage ;;
    esac
    shift 2 || usage
done
[[ -n $output && $minutes =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage
python=$(command -v "${PYTHON:-python3}") || { echo "error: ${PYTHON:-python3}: not found" >&2; exit 1; }
case $python in /*) ;; *) python=$PWD/$python ;; esac
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore USE_FLAX=0

device=$("$python" -c '
import re, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
print(re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))
') || { echo "error: $python cannot import torch; name another: PYTHON=/path/to/python" >&2; exit 1; }
mkdir -p "$output/$device" || exit 1
folder=$(cd "$output/$device" && pwd)
smallest=
[ "$device" = cpu ] && smallest=--smallest
total=$("$python" -c "print(round(60 * $minutes))")
failed=0
echo "$device, $minutes minutes, results in $folder"

# part NAME WEIGHT COMMAND...: run within WEIGHT / (weights left) of the time left, "LIMIT" in the
# command being its minutes; its output goes to a log.
left=100
part() {
    local name=$1 seconds=$(((total - SECONDS) * $2 / left)) limit status
    left=$((left - $2))
    shift 2
    if [ "$seconds" -lt 5 ]; then
        echo "$name: no time left"
        return
    fi
    # A little less than what ends it, so that it ends by itself.
    limit=$("$python" -c "print(round($seconds * 0.8 / 60, 2))")
    local begin=$SECONDS
    # Interrupted, pytest still says what failed.
    timeout --signal=INT --kill-after=20 "$seconds" "${@/#LIMIT/$limit}" >"$folder/$name.log" 2>&1
    status=$?
    case $status in
        0) echo "$name: $((SECONDS - begin)) s" ;;
        124 | 137)
            echo "$name: stopped after $seconds s; what it had is written"
            [[ $name == *tests ]] && failed=1
            ;;
        *)
            echo "$name: FAILED ($folder/$name.log)"
            tail -n 5 "$folder/$name.log" | cut -c 1-200 | sed 's/^/    /'
            failed=1
            ;;
    esac
}

cd "$root" || exit 1
bench() {
    part "$1" "$2" "$python" "scripts/benchmarks/$1.py" $smallest --minutes LIMIT --output "$folder"
}
# tests NAME WEIGHT FILE...: those of the files with a GPU side; with pytest-xdist four side by side.
processes=
"$python" -c 'import xdist' 2>/dev/null && processes='-n 4'
tests() {
    local name=$1 weight=$2
    shift 2
    part "$name" "$weight" "$python" -m pytest -m gpu -q $processes -p no:cacheprovider "$@"
    [ -f "$folder/$name.log" ] && tail -n 1 "$folder/$name.log" | cut -c 1-100
}
if [ "$device" = cpu ]; then
    echo "tests: left out, no GPU (bash scripts/test.sh runs them)"
    left=70
elif "$python" -c 'import pytest' 2>/dev/null; then
    # Apart: the commands run in forks, which a process that has used CUDA cannot have.
    tests command_tests 24 tests/sekd_fairseq/test_cuda.py tests/sekd_fairseq/test_same_numbers.py
    tests kernel_tests 6 tests/losses/test_{support,token_loss,chunked}.py
else
    echo "tests: left out, $python has no pytest"
    left=70
fi
bench bench_criterion 20
bench bench_training 25
if "$python" -c 'import transformers' 2>/dev/null; then
    bench bench_llm 25
else
    echo "bench_llm: left out, $python has no transformers"
fi

"$python" scripts/benchmarks/show_targets.py "$folder"/bench_*.json
exit $failed
