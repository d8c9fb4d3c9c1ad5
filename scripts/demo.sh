#!/usr/bin/env bash
# The main job, end to end: corpus, teacher, teacher cache, three students, scores, report.
set -euo pipefail

usage() {
    cat <<'TEXT'
bash scripts/demo.sh [--src FILE --tgt FILE --source-lang XX --target-lang YY] [--name NAME] [--smoke]

Installs into .venv and does the main job of this project on two CPU cores in some minutes: trains
a teacher, caches its distributions, trains three students (fine-tuning, word-level KD, SE-KD),
translates and scores the test set, and reports whether SE-KD transfers better.
An interrupted run resumes.

  (no options)      English-German from the translations in the homeassistant package
  --src, --tgt      your own parallel text, one sentence per line, aligned by line; needs
                    --source-lang and --target-lang
  --name NAME       name of the run directory (default: demo; user with --src; smoke with --smoke)
  --smoke           the smallest real size, about three minutes: for trying the pipeline
  --help            this text
TEXT
}

fail() { echo "error: $1" >&2; exit 1; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
src= tgt= source_lang= target_lang= name= config=demo
configs=(scripts/configs/demo.yaml)
while [ $# -gt 0 ]; do
    case $1 in
        --src | --tgt | --source-lang | --target-lang | --name)
            [ $# -ge 2 ] || fail "$1 expects a value"
            case $1 in
                --src) src=$(realpath -m -- "$2") ;;
                --tgt) tgt=$(realpath -m -- "$2") ;;
                --source-lang) source_lang=$2 ;;
                --target-lang) target_lang=$2 ;;
                --name) name=$2 ;;
            esac
            shift 2
            ;;
        --smoke) config=smoke; configs+=(scripts/configs/smoke.yaml); shift ;;
        --help | -h) usage; exit 0 ;;
        *) fail "unknown option $1; see --help" ;;
    esac
done
if [ -n "$src$tgt" ]; then
    [ -n "$src" ] && [ -n "$tgt" ] || fail "--src and --tgt belong together; one is missing"
    [ -n "$source_lang" ] && [ -n "$target_lang" ] ||
        fail "--src and --tgt need --source-lang and --target-lang (such as en and de)"
    for file in "$src" "$tgt"; do
        [ -f "$file" ] || fail "$file: expected a text file, found none"
    done
    name=${name:-user}
    for language in "$source_lang" "$target_lang"; do
        case $language in *[!A-Za-z0-9_]*) fail "expected languages of letters, digits and '_' (zh_Hans, not zh-Hans); found $language" ;; esac
    done
fi
name=${name:-$config}
case $name in *[!A-Za-z0-9_.-]*) fail "--name: expected letters, digits, '.', '_', '-'; found $name" ;; esac

bash "$root/scripts/install.sh" fairseq,workflow
cd "$root"
mkdir -p runs
exec 9>"runs/.$name.lock"
flock --nonblock 9 || fail "runs/$name: another demo is running there; wait for it, or give --name"

# As a configuration of its own: snakemake would take a name like 007 on its command line for a number.
own=runs/.$name.json
.venv/bin/python - "$name" "$src" "$tgt" "$source_lang-$target_lang" >"$own" <<'PYTHON'
import json, sys
name, src, tgt, direction = sys.argv[1:]
own = {"corpus": {"src": src, "tgt": tgt}, "directions": [direction]} if src else {}
print(json.dumps({"name": name} | own))
PYTHON
start=$SECONDS
# --nolock: the lock above ends with a kill, which snakemake's own does not. To remove that one would
# also take it from a study that runs beside this.
.venv/bin/python -m snakemake --snakefile scripts/Snakefile --cores 2 --nolock \
    --configfile "${configs[@]}" "$own" --quiet all --rerun-incomplete --keep-going || {
    log=$(ls -t .snakemake/log/*.log | head -n 1)
    tail -n 12 "$log" >&2
    fail "a step failed (see above, and $log); fix it and run the same command again, which resumes"
}
echo
.venv/bin/python scripts/pipeline/show_results.py "runs/$name/report"
echo "Done in $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s."
