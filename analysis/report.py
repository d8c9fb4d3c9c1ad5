"""The written report: Markdown, with its tables as CSV and its figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import page
from analysis.claims import verdicts
from analysis.figures import FIGURES, draw_all
from analysis.markup import interval, latex_table, markdown_table, number, p_value, percent
from analysis.runs.methods import label_of, ordered

if TYPE_CHECKING:
    from analysis.transfer import Results

TITLE = "Does the gain come from better transfer?"


def write_report(results: "Results", folder: Path) -> None:
    """Write tables, figures and ``report.md`` into a new folder."""
    for name, found in (("tables", results.tables), ("figures", results.figures)):
        (folder / name).mkdir(parents=True)
        for key, table in found.items():
            table.to_csv(folder / name / f"{key}.csv", index=False, float_format="%.9g")
    drawn = draw_all(folder / "figures")
    text = markdown(results, drawn)
    pages = {
        "report.md": text,
        "report.html": page.report_page(text, folder, TITLE),
        "examples.html": page.render(
            "examples.html", title="Sentences that gained and lost most", groups=results.examples
        ),
        "tables/results.tex": latex_table(
            pd.DataFrame(_quality_rows(results)),
            "sacreBLEU scores with 95\\,\\% bootstrap intervals.",
            "tab:results",
        ),
        "tables/claims.tex": latex_table(
            pd.DataFrame(_claim_rows(_deciding(results))),
            "The claims and their verdicts.",
            "tab:claims",
        ),
    }
    for name, content in pages.items():
        (folder / name).write_text(content, encoding="utf-8")


def markdown(results: "Results", drawn: Sequence[str]) -> str:
    """The report as Markdown, with links to the figures that were drawn."""
    parts = [f"# {TITLE}", _scope(results)]
    parts += ["## Claims", *_claims(results)]
    parts += ["## Translation quality", *_quality(results)]
    parts += _figure("quality", drawn, "BLEU of every run, 95 % bootstrap interval over sentences.")
    caption = "BLEU over the baseline, hierarchical 95 % intervals; BLEU itself on the right."
    parts += _figure("methods", drawn, caption)
    caption = (
        "BLEU by one hyper-parameter at a time, the others as in most runs; the broken line is the "
        "baseline."
    )
    parts += _figure("sensitivity", drawn, caption, "## Sensitivity")
    parts += ["## Transfer by bucket", *_transfer(results)]
    caption = "KL to the teacher by bucket, mean over directions and seeds."
    parts += _figure("transfer", drawn, caption)
    parts += ["## Difficulty"]
    parts += _figure(
        "difficulty", drawn, "How hard the tokens are for each method; Γ cuts easy and hard."
    )
    caption = "KL to the teacher on easy and hard tokens."
    parts += _figure("training", drawn, caption, "## Over training")
    caption = "Tokens that move between easy and hard from one scored checkpoint to the next."
    parts += _figure("transitions", drawn, caption)
    caption = (
        "Sentence chrF gained over the baseline by transfer gained; tenths of the sentences, 95 % "
        "intervals."
    )
    parts += _figure("sentences", drawn, caption, "## Quality against transfer")
    parts += ["## How this was computed", *_method(results)]
    return "\n\n".join(parts) + "\n"


def summary(results: "Results") -> str:
    """A few lines for the terminal: scores, verdicts, and what was left out."""
    lines = []
    for row in _sorted(results.tables["results"]).to_dict("records"):
        lines.append(
            f"{row['direction']:8} {label_of(row['method']):28} seed {row['seed']:<6} "
            f"BLEU {row['BLEU']:6.2f}  chrF {row['chrF']:6.2f}"
        )
    for row in _deciding(results).drop_duplicates(["treatment", "claim"]).to_dict("records"):
        lines.append(f"claim {row['claim']} ({row['treatment']}): {row['verdict']}")
    lines += [f"left out: {item.label}: {item.reason}" for item in results.left_out]
    return "\n".join(lines)


def _scope(results: "Results") -> str:
    lines = []
    for direction in results.directions:
        tokens = direction.tokens
        size = (
            f"{len(tokens.sentences)} sentences, {len(tokens.token)} tokens" if tokens else "none"
        )
        seeds = sorted({run.seed for run in direction.runs})
        lines.append(
            f"- {direction.name}: {_count(len(direction.runs), 'run')}, "
            f"{_count(len(seeds), 'seed')}; token records of `{results.options.subset}`: {size}"
        )
    lines += [f"- left out: `{item.label}`: {item.reason}" for item in results.left_out]
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _deciding(results: "Results") -> pd.DataFrame:
    table = results.tables["claims"]
    return table[(table["scope"] == "all") & table["decides"].astype(bool)]


def _claims(results: "Results") -> list[str]:
    table = results.tables["claims"]
    if results.options.subset.startswith("train"):
        return ["No claim is computed from the training set."]
    if table.empty:
        return ["No run of a SE-KD method to judge."]
    parts = []
    for treatment in ordered(table["treatment"]):
        own = table[(table["treatment"] == treatment) & (table["scope"] == "all")]
        baseline = results.options.baseline
        parts.append(f"**{label_of(treatment)}** against {label_of(baseline)}:")
        parts.append(markdown_table(pd.DataFrame(_claim_rows(own))))
    parts.append(
        "Effects above 0 are in the claim's favour; measures in brackets accompany a claim and do not "
        "decide it. `tables/claims.csv` has each direction alone."
    )
    parts.append(
        "The rule:\n\n" + "\n".join(f"- {line}" for line in verdicts.rule(results.options))
    )
    return parts


def _claim_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "claim": f"{row['claim']}. {row['statement']}",
            "measure": row["measure"] if row["decides"] else f"({row['measure']})",
            "effect": interval(row["effect"], row["low"], row["high"]),
            "relative": percent(row["relative_effect"]) if row["claim"] != 4 else "",
            "p": p_value(row["p"]),
            "p (Holm)": p_value(row["p_holm"]),
            "seeds": row["seeds"],
            "sentences": row["sentences"],
            "tokens": row["tokens"],
            "verdict": _verdict(row),
        }
        for row in table.to_dict("records")
    ]


def _verdict(row: dict[Any, Any]) -> str:
    reason = row["reason"] if isinstance(row["reason"], str) else ""
    return f"{row['verdict']} ({reason})" if reason else str(row["verdict"])


def _quality_rows(results: "Results") -> list[dict[str, Any]]:
    table = _sorted(results.tables["results"])
    return [
        {
            "direction": row["direction"],
            "method": label_of(row["method"]),
            "seed": row["seed"],
            "BLEU": interval(row["BLEU"], row["BLEU_low"], row["BLEU_high"], 2),
            "chrF": interval(row["chrF"], row["chrF_low"], row["chrF_high"], 2),
            **(
                {"COMET": interval(row["COMET"], row["COMET_low"], row["COMET_high"], 2)}
                if "COMET" in row
                else {}
            ),
            "over fine-tuning": _gain(row, "finetune"),
            "over word-level KD": _gain(row, "word_kd"),
            "sentences": row["sentences"],
        }
        for row in table.to_dict("records")
    ]


def _quality(results: "Results") -> list[str]:
    rows = _quality_rows(results)
    if not rows:
        return ["No run has translations."]
    parts = [
        markdown_table(pd.DataFrame(rows)),
        (
            "Gains are in BLEU, with the p-value of sacreBLEU's paired bootstrap between the two runs "
            "(approximate randomisation and chrF: `tables/results.csv`); they know nothing of seeds."
        ),
    ]
    methods = results.tables["methods"]
    if (methods["seeds"] > 1).any():
        rows = [
            {
                "direction": row["direction"],
                "method": label_of(row["method"]),
                "metric": row["metric"],
                "seeds": row["seeds"],
                "mean ± sd": _mean(row),
                **{f"over {label_of(base)}": _over(row, base) for base in ("finetune", "word_kd")},
            }
            for row in _sorted(methods).to_dict("records")
        ]
        parts += ["Over seeds, with the interval that holds training and sentences:"]
        parts += [markdown_table(pd.DataFrame(rows))]
    table = results.tables["results"]
    signatures = sorted({*table["BLEU_signature"], *table["chrF_signature"]})
    parts.append("Signatures: " + ", ".join(f"`{item}`" for item in signatures))
    return parts


def _mean(row: dict[Any, Any]) -> str:
    return f"{row['mean']:.2f}" + (f" ± {row['sd_over_seeds']:.2f}" if row["seeds"] > 1 else "")


def _gain(row: dict[Any, Any], baseline: str) -> str:
    gain = row[f"BLEU_gain_over_{baseline}"]
    p = row[f"BLEU_p_bootstrap_over_{baseline}"]
    return "" if np.isnan(gain) else f"{gain:+.2f} (p = {p:.3f})"


def _over(row: dict[Any, Any], baseline: str) -> str:
    prefix = f"gain_over_{baseline}"
    if np.isnan(row[prefix]):
        return ""
    shown = interval(row[prefix], row[f"{prefix}_low"], row[f"{prefix}_high"], 2)
    return f"{shown}, p {p_value(row[f'{prefix}_p'], equals='= ')}"


def _transfer(results: "Results") -> list[str]:
    table = results.tables["transfer"]
    parts = ["Means over seeds; each run alone, with intervals: `tables/transfer.csv`."]
    for family in ("difficulty", "all"):
        own = _over_seeds(table[table["family"] == family], ["bucket"])
        rows = [
            {
                "direction": row["direction"],
                "method": label_of(row["method"]),
                "seeds": row["seeds"],
                "bucket": row["bucket"],
                "tokens": row["tokens"],
                "KL": _spread(row, "kl"),
                "target": number(row["kl_target"], 3),
                "non-target": number(row["kl_nontarget"], 3),
                "agreement": percent(row["agreement"]),
                "student right": percent(row["student_right"]),
                "teacher right": percent(row["teacher_right"]),
                "overlap top 5": percent(row["overlap_top5"]),
            }
            for row in own.to_dict("records")
        ]
        parts.append(markdown_table(pd.DataFrame(rows)))
    gains = results.tables["gain"]
    gains = _over_seeds(gains[gains["family"] == "difficulty"], ["baseline", "bucket"])
    if not gains.empty:
        rows = [
            {
                "direction": row["direction"],
                "method": label_of(row["method"]),
                "over": label_of(row["baseline"]) + (" †" if row["selected_by_pair"] else ""),
                "seeds": row["seeds"],
                "bucket": row["bucket"],
                "tokens": row["tokens"],
                "gain (nats)": _spread(row, "gain"),
                "relative": percent(row["relative_gain"]),
                "lead closed": percent(row["lead_closed"]),
            }
            for row in gains.to_dict("records")
        ]
        parts += ["Gain in KL to the teacher:", markdown_table(pd.DataFrame(rows))]
        parts.append(
            "† The difficulty of one of the two cut the tokens: some of its hard tokens are hard by "
            "chance, so any other run looks better there and worse on the easy ones. No claim about "
            "hard or easy tokens is decided by such a row."
        )
    parts.append("Other families and measures: `tables/transfer.csv`, `tables/gain.csv`.")
    return parts


def _over_seeds(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means of the number columns over the seeds of a method, with ``seeds`` and ``*_sd``."""
    if table.empty:
        return table
    groups = table.groupby(["direction", "method", *by], sort=False)
    means = groups.mean(numeric_only=True)
    means["seeds"] = groups.size()
    means["tokens"] = groups["tokens"].mean().round().astype(int)
    for name in ("kl", "gain"):
        if name in means:
            means[f"{name}_sd"] = groups[name].std()
    return _sorted(means.reset_index())


def _spread(row: dict[Any, Any], name: str) -> str:
    """A value with its interval (one seed), or with its standard deviation over seeds."""
    if row["seeds"] == 1:
        return interval(row[name], row[f"{name}_low"], row[f"{name}_high"])
    return "no tokens" if pd.isna(row[name]) else f"{row[name]:.3f} ± {row[f'{name}_sd']:.3f}"


def _method(results: "Results") -> list[str]:
    options = results.options
    threshold = options.threshold
    what = "quantile" if threshold.kind == "quantile" else "nats"
    cuts = []
    for direction in results.directions:
        cut = {run.cut.selector: run.cut.gamma for run in direction.scored}
        named = ", ".join(
            f"{' + '.join(f'`{label}`' for label in labels)} Γ = {gamma:.4g} nats"
            for labels, gamma in cut.items()
        )
        cuts.append(f"- {direction.name}: {named}")
    return [
        (
            "That the paper's gain comes from better transfer is the paper's own analysis; how it is "
            "tested here (buckets, measures, margins, tests) is this project's reading."
        ),
        (
            f"Difficulty is KL(p‖q) of teacher p and student q at a reference token, in nats. A token is "
            f"hard if its mean difficulty for the reference runs (`{' '.join(options.references)}`) is above Γ "
            f"({what} {threshold.value:g}):"
        ),
        "\n".join(cuts),
        (
            f"{options.resamples} resamples, random seed {options.seed}. Intervals by bucket are 95 % "
            "percentile intervals of a bootstrap over sentences, for one run."
        ),
    ]


def _figure(name: str, drawn: Sequence[str], caption: str, *heading: str) -> list[str]:
    """A figure with its caption, below a heading of its own if one is given; nothing where it was
    not drawn."""
    if name not in drawn or name not in FIGURES:
        return []
    return [*heading, f"![{caption}](figures/{name}.svg)", f"*{caption}* (`figures/{name}.csv`)"]


def _sorted(table: pd.DataFrame) -> pd.DataFrame:
    """By direction, then method in reading order; the rows of a run keep theirs."""
    if table.empty:
        return table
    keys = {method: index for index, method in enumerate(ordered(table["method"]))}
    place = table["method"].map(keys)
    by = [name for name in ("direction", "_place", "seed") if name in (*table.columns, "_place")]
    return table.assign(_place=place).sort_values(by, kind="stable")
