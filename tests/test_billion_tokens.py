"""The plan of docs/billion-tokens.md is arithmetic on what results/ holds."""

import csv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = " ".join((ROOT / "docs" / "billion-tokens.md").read_text(encoding="utf-8").split())
BILLION = 1e9
#: Target tokens and sentences of scripts/benchmarks/bench_training.py on a GPU (seeded, so always these).
TOKENS, SENTENCES = 671_318, 26_000


def table(name: str) -> list[dict[str, str]]:
    with (ROOT / "results" / f"{name}.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(("k", "bits"), [(16, 8), (32, 8), (32, 16), (64, 8)])
def test_bytes(k: int, bits: int) -> None:
    (row,) = (
        row
        for row in table("bench_cache")
        if (row["teacher"], row["rule"], row["value"], row["bits"])
        == ("plain", "top_k", str(k), str(bits))
    )
    size = float(row["bytes_a_token"])
    assert size == pytest.approx(16.28 + k * (2 + bits / 8), abs=0.01)
    assert f"| {k} | {bits} | {size} | {size:.1f} GB | {size + 2 * k:.1f} GB |" in PAGE


def test_shards() -> None:
    sentences = BILLION / TOKENS * SENTENCES
    assert f"{sentences / 1e6:.1f} million sentences" in PAGE
    shard = 64.28 * 100_000 * TOKENS / SENTENCES / 1e6
    assert f"they are {-(-sentences // 100_000):.0f} shards of {shard:.0f} MB" in PAGE


def test_hours_and_cost() -> None:
    rows = {row["method"]: row for row in table("bench_training_gpu")}
    speed = TOKENS / float(rows["building the cache"]["seconds"])
    building = BILLION / speed / 3600
    assert f"{speed:,.0f} tokens per second, or **{building:.1f} GPU-hours**" in PAGE
    trained = float(rows["SE-KD, cached"]["target_tokens_a_second"])
    epoch = BILLION / trained / 3600
    assert f"{trained:,.0f} target tokens per second" in PAGE
    assert f"of a billion takes {epoch:.2f} hours" in PAGE
    assert f"so {building + 10 * epoch:.1f} GPU-hours" in PAGE
    (row,) = (row for row in table("bench_llm_gpu") if "SE-KD" in row["loop"])
    rate = 6 * 135e6 * float(row["tokens_a_second"])
    assert f"that is {rate:.1e} per second".replace("e+13", "e13") in PAGE
    hours = 2 * BILLION * BILLION / rate / 3600
    assert f"`{hours:.1f} P r` GPU-hours: {7 * 3 * hours:.0f} for" in PAGE
    assert f"{13 * 3 * hours:.0f} for 13 billion" in PAGE
