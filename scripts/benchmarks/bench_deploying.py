"""Translating in CTranslate2 beside fairseq: speed, size, and whether the translations are the same.

    python scripts/benchmarks/bench_deploying.py DATA --student STUDENT.pt --teacher TEACHER.pt \\
        --text FOLDER --source-lang de --target-lang en

DATA is the data directory of both; FOLDER has test.de, test.en and sentencepiece.model (prepare_data writes all).
The test set is translated with a beam of four, on one thread, by fairseq and by the converted models in float32
and int8, in turn. Writes results/bench_deploying.csv and .json.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ctranslate2
import sentencepiece
import torch
from benchmarking import RESULTS, Target, time_in_turn, write_results
from ctranslate2.converters import FairseqConverter
from fairseq.dataclass.configs import GenerationConfig
from sacrebleu.metrics import BLEU

import sekd_fairseq
from analysis.runs.texts import read_lines
from sekd_fairseq.checkpoints import load_models
from sekd_fairseq.plugin import quiet_fairseq
from sekd_fairseq.splits import load_split, token_batches

BEAM, PENALTY, MAX_TOKENS = 4, 1.0, 4096
#: What CTranslate2 computes in.
TYPES = ("float32", "int8")


def fairseq_translations(path: str, data: str) -> Callable[[], list[str]]:
    """What translates the test set as fairseq-generate does; pieces, in the order of the sentences."""
    (model,), _, task = load_models([path], data, torch.device("cpu"))
    dataset = load_split(task, "test", data)
    batches = token_batches(dataset, range(len(dataset)), MAX_TOKENS)
    samples = [dataset.collater([dataset[i] for i in batch]) for batch in batches]
    settings = GenerationConfig(beam=BEAM, lenpen=PENALTY)
    generator = task.build_generator([model], settings)

    def translate() -> list[str]:
        found = {}
        for sample in samples:
            best = task.inference_step(generator, [model], sample)
            for sentence, (first, *_) in zip(sample["id"].tolist(), best, strict=True):
                found[sentence] = task.target_dictionary.string(first["tokens"])
        return [found[sentence] for sentence in sorted(found)]

    return translate


def converted_translations(
    folder: Path, compute_type: str, sources: Sequence[list[str]]
) -> Callable[[], list[str]]:
    """What translates the same in CTranslate2."""
    translator = ctranslate2.Translator(str(folder), compute_type=compute_type, intra_threads=1)

    def translate() -> list[str]:
        found = translator.translate_batch(
            sources, beam_size=BEAM, length_penalty=PENALTY, max_decoding_length=200,
            max_batch_size=MAX_TOKENS, batch_type="tokens",
        )  # fmt: skip
        return [" ".join(one.hypotheses[0]) for one in found]

    return translate


def convert(path: str, args: argparse.Namespace, quantization: str, output: Path) -> Path:
    """Convert a checkpoint."""
    converter = FairseqConverter(
        path, args.data, args.source_lang, args.target_lang, user_dir=str(Path(sekd_fairseq.__file__).parent),
    )  # fmt: skip
    converter.convert(str(output), quantization=quantization)
    return output


def measure(name: str, path: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Speed, size and BLEU of one model, a row per program and type."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(args.text / "sentencepiece.model"))
    sources, references = (
        read_lines(args.text / f"test.{language}")
        for language in (args.source_lang, args.target_lang)
    )
    cut = [pieces.encode(line, out_type=str) for line in sources]
    models = {kind: convert(path, args, kind, folder / f"{name}-{kind}") for kind in TYPES}
    contenders = {"fairseq": fairseq_translations(path, args.data)}
    contenders |= {kind: converted_translations(models[kind], kind, cut) for kind in TYPES}
    own = contenders["fairseq"]()
    timings = time_in_turn(contenders, torch.device("cpu"), (3, 3))
    sizes = {
        "fairseq": 4
        * sum(
            p.numel()
            for p in load_models([path], args.data, torch.device("cpu"))[0][0].parameters()
        )
    }
    sizes |= {kind: (models[kind] / "model.bin").stat().st_size for kind in TYPES}
    rows = []
    for contender, timing in timings.items():
        texts = contenders[contender]()
        score = BLEU().corpus_score([pieces.decode(text.split()) for text in texts], [references])
        rows.append(
            {
                "model": name,
                "program": contender if contender == "fairseq" else f"ctranslate2 {contender}",
                "sentences": len(texts),
                "seconds": round(timing.median, 3),
                "low": round(timing.low, 3),
                "high": round(timing.high, 3),
                "times_fairseq": round(timings["fairseq"].median / timing.median, 2),
                "bytes": sizes[contender],
                "bleu": round(score.score, 2),
                "same_as_fairseq": sum(map(str.__eq__, texts, own)),
            }
        )
    return rows


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """Ours: nobody set any."""
    found = []
    for row in rows:
        if row["program"] == "fairseq":
            before = row["bleu"]
            continue
        title = f"{row['model']}, {row['program']}"
        lost = round(before - row["bleu"], 2)
        found.append(
            Target(f"{title}: BLEU below fairseq's", lost, 0.1 if "float" in title else 0.5)
        )
        found.append(
            Target(f"{title}: times fairseq's speed", row["times_fairseq"], 1.0, at_least=True)
        )
    return found


def main() -> None:
    """Measure student and teacher."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--student", required=True, metavar="CHECKPOINT")
    parser.add_argument("--teacher", required=True, metavar="CHECKPOINT")
    parser.add_argument("--text", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--source-lang", required=True)
    parser.add_argument("--target-lang", required=True)
    parser.add_argument("--output", type=Path, default=RESULTS, help="(default: %(default)s)")
    args = parser.parse_args()
    quiet_fairseq()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name in ("student", "teacher")
            for row in measure(name, getattr(args, name), args, Path(folder))
        ]
    write_results("bench_deploying", rows, targets(rows), torch.device("cpu"), args.output)


if __name__ == "__main__":
    main()
