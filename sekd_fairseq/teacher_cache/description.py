"""A cache in words, for its user."""

from pathlib import Path

from analysis.runs.files import hash_file
from sekd_fairseq.teacher_cache.format import Manifest


def describe(place: str | Path, manifest: Manifest) -> str:
    """A cache as text, one fact a line."""
    size = sum(shard.bytes for shard in manifest.shards)
    quality, teacher = manifest.quality, manifest.teacher
    tokens = max(manifest.tokens, 1)
    rule = ", ".join(
        f"{key} {value}" for key, value in manifest.truncation.items() if key != "rule"
    )
    who = teacher["arch"]  # vLLM does not say how many parameters it runs
    if "parameters" in teacher:
        who += f", {sum(teacher['parameters']):,} parameters"
    at = f" at temperature {manifest.temperature:g}" if manifest.temperature != 1 else ""
    lines = [
        f"{place}",
        f"  split         {manifest.split}: {manifest.sentences:,} sentences, "
        f"{manifest.tokens:,} tokens, vocabulary {manifest.vocab_size:,}",
        f"  teacher       {', '.join(teacher['files'])} ({who}), "
        f"temperature {manifest.temperature:g}",
        f"  predicts      references{at} with perplexity {quality['perplexity']:.2f} (unigrams: "
        f"{quality['unigram_perplexity']:.2f}), accuracy {quality['accuracy']:.1%}; mean entropy "
        f"{quality['entropy']:.3f} nats",
        f"  truncation    {manifest.truncation['rule']} ({rule}): mean support "
        f"{quality['support']:.1f} tokens with {1 - quality['outside_mass']:.4%} of the mass; the "
        f"reference is kept on its own merit at {quality['reference_kept']:.1%} of tokens",
        f"  size          {size:,} bytes in {len(manifest.shards)} shards, {size / tokens:.1f} "
        f"bytes per token (dense float16: {2 * manifest.vocab_size:,})",
        f"  fingerprint   {manifest.fingerprint}",
    ]
    if quality.get("capped", 0) > 0:
        asked = manifest.truncation
        lines.insert(
            5,
            f"  capped        {quality['capped']:.1%} of tokens have less than --top-p {asked['p']:g} "
            f"of the mass, because --top-k {asked['k']} is the most that is kept; raise it for more",
        )
    if quality["one_hot"] > 0:
        lines.insert(
            4,
            f"  alone         {quality['one_hot']:.2%} of tokens have the reference alone, with "
            f"probability 1 ({manifest.why_alone})",
        )
    return "\n".join(lines)


def another_teacher(manifest: Manifest, paths: str) -> str | None:
    """What to say where checkpoints (joined with ``:``) are not those that a cache was built from."""
    known = manifest.teacher.get("sha256", [])
    given = [Path(path) for path in paths.split(":")]
    hashes = [hash_file(path) for path in given if path.is_file()]
    if len(hashes) < len(given) or sorted(hashes) == sorted(known):
        return None  # a file that is missing is for whoever loads it to say
    return (
        f"{paths} (sha256 {', '.join(value[:12] for value in hashes)}) is not the cache's teacher: "
        f"{':'.join(manifest.teacher['files'])} ({', '.join(value[:12] for value in known)})"
    )
