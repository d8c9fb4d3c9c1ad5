"""Finished runs of a direction in three small files, and back.

- ``DIRECTION.json``: of each run the contents of ``run.json`` and ``scores.json``, and of its token records
  the footers;
- ``DIRECTION.parquet``: a row per reference token. Columns that are the teacher's or the test set's, the
  same in all runs, stand once; the others are named ``RUN:STEP:COLUMN``. Numbers are rounded
  (:func:`code`), rows stand beside those that are like them, which compresses well, and of each
  piece only stays whether it begins a word. Of updates before the last only the KL to the teacher is kept;
- ``DIRECTION.translations.parquet``: of each sentence the translations of all runs, one after the other.

A restored number lies anywhere in the interval that was rounded to it, from a fixed seed, so that the share
of tokens above a threshold and every mean stay what they were.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.runs.errors import UserError
from analysis.runs.files import is_sealed, sealed_json, sealed_parquet
from analysis.runs.languages import languages_of
from analysis.runs.run_record import FORMAT_VERSION
from analysis.runs.texts import read_lines
from analysis.runs.token_records import COLUMNS, PROBABILITIES

#: Columns that are the teacher's or the test set's.
SHARED = (
    "sentence", "position", "token", "piece", "frequency", "p_gold", "p_entropy", "p_max", "p_top1",
    "p_top1_piece",
)  # fmt: skip
#: Units of numbers that only means are taken of; the others fall into LEVELS intervals to each doubling.
STEPS = {"q_entropy": 1 / 8, "q_max": 1 / 16, "p_of_q_top1": 1 / 16}
LEVELS = 2
#: In the folder of a run that was put back: it is what another such may be written over.
RESTORED = "restored"
#: Codes of no number, and of a student's choice that is the teacher's.
ZERO = -(2**15)
AS_TEACHER = -1


def keep_direction(runs: Sequence[Path], subset: str, place: Path) -> None:
    """Write ``PLACE.json``, ``PLACE.parquet`` and ``PLACE.translations.parquet``."""
    kept: dict[str, Any] = {}
    columns: dict[str, Any] = {}
    shared: pa.Table | None = None
    texts = {}
    for run in runs:
        contents = {
            name: json.loads((run / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("run", "scores")
        }
        kept[run.name] = contents | {"footers": {}}
        texts[run.name] = read_lines(run / "hyps" / f"{subset}.txt")
        for path in sorted((run / "tokens" / subset).glob("*.parquet")):
            is_sealed(path)
            table = pq.read_table(path)
            footer = table.schema.metadata or {}
            kept[run.name]["footers"][path.stem] = {
                key.decode(): value.decode()
                for key, value in footer.items()
                if key.startswith(b"sekd.")
            }
            own = table.select(SHARED)
            if shared is not None and not own.equals(shared):
                raise UserError(
                    f"{path}: expected the tokens and the teacher of the other runs, found others; "
                    "score the run again, or keep it as another study"
                )
            shared = own
            last = path.stem == str(contents["run"]["updates"])
            for name in table.column_names:
                if name in SHARED or name.endswith("_piece") or (name == "kl") == last:
                    continue  # at the last update kl is the sum of its two parts
                values = table[name].to_numpy()
                if name == "q_top1":
                    values = np.where(values == table["p_top1"].to_numpy(), AS_TEACHER, values)
                columns[f"{run.name}:{path.stem}:{name}"] = code(name, values)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_name(f"{place.name}.json").write_bytes(sealed_json({"runs": kept}))
    together = [line for sentence in zip(*texts.values(), strict=True) for line in sentence]
    write(
        pa.table({"translation": together}), place.with_name(f"{place.name}.translations.parquet")
    )
    if shared is not None:
        pieces = shared["piece"].cast(pa.string()).to_pylist()
        kept_once = {name: shared[name] for name in SHARED if not name.endswith("piece")}
        table = pa.table(kept_once | {"piece": pa.array(markers(pieces))} | columns)
        write(table.take(alike(table)), place.with_name(f"{place.name}.parquet"), list(columns))


def alike(table: pa.Table) -> NDArray[Any]:
    """An order of the rows: bands of the teacher's probability, and in each by distance to the teacher."""
    probability = table["p_gold"].to_numpy()
    bands = np.searchsorted(np.quantile(probability, np.linspace(0, 1, 17)[1:-1]), probability)
    distances = [name for name in table.column_names if name.endswith((":kl", ":kl_target"))]
    return np.lexsort([sum(table[name].to_numpy() for name in distances), bands])


def restore_direction(place: Path, subset: str, runs: Path, text: Path | None) -> list[Path]:
    """Write the run directories that :func:`keep_direction` kept below ``runs``; with the translations
    where ``text``, the prefix of their source and reference files, is given.

    Raises
    ------
    UserError
        A run of this name was made here; nothing of this direction has been written.
    """
    kept = json.loads(place.with_name(f"{place.name}.json").read_text(encoding="utf-8"))["runs"]
    for run in (runs / name for name in kept):
        if was_made_here(run):
            raise UserError(
                f"{run}: expected no run, or a restored one, found one that was made here, whose records "
                "are not rounded; move it away, or restore with another name (runs: NAME in a "
                "configuration that is given last)"
            )
    table = pq.read_table(place.with_name(f"{place.name}.translations.parquet"))
    translations = table["translation"].to_pylist()
    path = place.with_name(f"{place.name}.parquet")
    is_sealed(path)
    table = pq.read_table(path)
    table = table.take(np.lexsort([table["position"].to_numpy(), table["sentence"].to_numpy()]))
    noise = np.random.default_rng(0)
    for number, (name, contents) in enumerate(kept.items()):
        folder = runs / name
        (folder / "hyps").mkdir(parents=True, exist_ok=True)
        (folder / RESTORED).touch()
        for part in ("run", "scores"):
            contents[part].pop("checksum", None)  # another is written
            if "format_version" in contents[part]:
                contents[part]["format_version"] = FORMAT_VERSION
            (folder / f"{part}.json").write_bytes(sealed_json(contents[part]))
        if text is not None:
            lines = "".join(f"{line}\n" for line in translations[number :: len(kept)])
            (folder / "hyps" / f"{subset}.txt").write_text(lines, encoding="utf-8")
            languages = languages_of(contents["run"]["direction"])
            for suffix, language in zip((".src", ".ref"), languages, strict=True):
                lines = "".join(f"{line}\n" for line in read_lines(Path(f"{text}.{language}")))
                (folder / "hyps" / f"{subset}{suffix}.txt").write_text(lines, encoding="utf-8")
        for step, footer in contents["footers"].items():
            footer["sekd.format_version"] = str(FORMAT_VERSION)
            records = whole(table, f"{name}:{step}:", noise).replace_schema_metadata(footer)
            path = folder / "tokens" / subset / f"{step}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sealed_parquet(records, compression="zstd"))
    return [runs / name for name in kept]


def was_made_here(run: Path) -> bool:
    """Whether a run's folder holds what was trained or measured here, and not restored alone."""
    measured = (run / "run.json").exists() and not (run / RESTORED).exists()
    return measured or (run / "checkpoints").exists()


def whole(table: pa.Table, prefix: str, noise: np.random.Generator) -> pa.Table:
    """The token records of a run and step; what was not kept is NaN, -1 or empty."""
    found: dict[str, Any] = {}
    for name in COLUMNS:
        if name in table.column_names:
            found[name] = table[name]
        elif f"{prefix}{name}" in table.column_names:
            found[name] = decode(name, table[f"{prefix}{name}"].to_numpy(), noise)
    if "q_top1" in found:
        agree = found["q_top1"] == AS_TEACHER
        found["q_top1"] = np.where(agree, table["p_top1"].to_numpy(), found["q_top1"])
    if "kl" not in found and "kl_target" in found:
        found["kl"] = found["kl_target"] + found["kl_nontarget"]
    empty = {"float": np.nan, "int": -1, "text": ""}
    types = {"float": np.float32, "int": np.int32, "text": object}
    for name, column in COLUMNS.items():
        if name not in found:
            found[name] = np.full(len(table), empty[column.kind], types[column.kind])
    return pa.table(
        {
            name: pa.array(found[name]) if isinstance(found[name], np.ndarray) else found[name]
            for name in COLUMNS
        }
    )


def code(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Numbers as small integers: in units of STEPS, or of one of LEVELS intervals to each doubling; integers as they are."""
    if values.dtype.kind != "f":
        return values.astype(np.int32)
    if name in STEPS:
        return np.round(values / STEPS[name]).astype(np.int32)
    mantissa, exponent = np.frexp(values)  # mantissa in [0.5, 1)
    codes = LEVELS * exponent + np.floor(LEVELS * (2 * mantissa - 1)).astype(np.int32)
    return np.where(values > 0, codes, ZERO).astype(np.int32)


def decode(name: str, codes: NDArray[Any], noise: np.random.Generator) -> NDArray[Any]:
    """Numbers of :func:`code`; where it has LEVELS, anywhere in the interval that has this code."""
    if COLUMNS[name].kind != "float":
        return codes
    if name in STEPS:
        return (codes * STEPS[name]).astype(np.float32)
    exponent, level = np.divmod(codes, LEVELS)
    low, high = (1 + level / LEVELS) / 2, (1 + (level + 1) / LEVELS) / 2
    spread = low * (high / low) ** noise.random(len(codes))  # small numbers are more frequent
    values = np.where(codes == ZERO, 0, np.ldexp(spread, exponent))
    return np.minimum(values, 1.0 if name in PROBABILITIES else np.inf).astype(np.float32)


def markers(pieces: Sequence[str]) -> list[str]:
    """Of each piece what says whether it, or the next, begins a word
    (:func:`analysis.sums.buckets.by_piece`), and nothing of the text."""
    found = []
    for piece in pieces:
        end = "@@" if piece.endswith("@@") else ""
        found.append(piece[0] if piece.startswith(("▁", "Ġ")) else end)
    return found


def write(table: pa.Table, path: Path, coded: Sequence[str] = ()) -> None:
    """Write a Parquet file, small, which takes its time; ``coded`` are columns of :func:`code`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {"translation", *coded}  # sentences that are alike are no dictionary
    content = sealed_parquet(
        table,
        compression="brotli",
        compression_level=11,
        use_dictionary=[name for name in table.column_names if name not in plain],
        data_page_size=2**24,
        column_encoding=dict.fromkeys(coded, "BYTE_STREAM_SPLIT") or None,
        write_statistics=False,
    )
    path.write_bytes(content)
