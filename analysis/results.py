"""Everything that a report shows, computed from the runs below a directory."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.chapters import (
    difficulty,
    examples,
    methods,
    quality,
    sensitivity,
    sentences,
    training,
    transfer,
    transitions,
)
from analysis.claims.verdicts import claims_table
from analysis.runs.errors import UserError
from analysis.runs.run_record import LeftOut
from analysis.sums.direction import Direction, Options
from analysis.sums.loading import load


@dataclass(frozen=True)
class Results:
    """Everything that a report shows.

    ``tables`` go to ``tables/``, ``figures`` (the tables of the figures) to ``figures/``.
    """

    directions: list[Direction]
    left_out: list[LeftOut]
    options: Options
    tables: dict[str, pd.DataFrame]
    figures: dict[str, pd.DataFrame]
    examples: list[examples.Group]


def analyse(root: Path, options: Options, comet: Path | None = None) -> Results:
    """Compute every table of a report from the runs below ``root``; ``comet`` is a COMET model.

    Raises
    ------
    UserError
        Nothing below ``root`` can be compared, or no token records can be judged where there are any.
    """
    directions, left_out = load(root, options, comet)
    with_records = any(run.step is not None for item in directions for run in item.runs)
    if with_records and not any(item.scored for item in directions):
        reasons = "; ".join(f"{item.label}: {item.reason}" for item in left_out)
        raise UserError(
            f"expected a direction whose token records can be judged, found none: {reasons}"
        )
    results = quality.results_table(directions, options)
    claims, relation = claims_table(directions, options)
    levels, gains = transfer.transfer_tables(directions, options)
    tables = {
        "claims": claims,
        "relation": relation,
        "results": results,
        "methods": methods.methods_table(directions, options),
        "transfer": levels,
        "gain": gains,
        "transitions": transitions.transition_table(directions, options),
    }
    figures = {
        "claims": claims.rename(columns={"treatment": "method"}),
        "difficulty": difficulty.difficulty_table(directions, options),
        "transfer": tables["transfer"],
        "quality": results,
        "methods": tables["methods"],
        "sensitivity": sensitivity.sensitivity_table(directions, options),
        "training": training.training_table(directions, options),
        "transitions": tables["transitions"],
        "sentences": sentences.sentence_table(directions, options),
    }
    shown = examples.example_groups(directions, options)
    return Results(directions, left_out, options, tables, figures, shown)
