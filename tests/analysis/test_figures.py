"""What figures show, their size, and one's own style."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from analysis import figures, style
from analysis.chapters import claims, methods, quality, sensitivity, training, transfer, transitions
from analysis.comparison import drawings
from analysis.runs.errors import UserError
from analysis.style import COLUMN, PAGE, looks

Drawn = Callable[..., list[Axes]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Drawn:
    """Draws a table and gives its panels."""
    saved: list[Figure] = []
    for module in (style, claims, sensitivity, transfer, transitions):
        monkeypatch.setattr(module, "save", lambda figure, path: saved.append(figure))

    def draw(function: Callable[..., None], table: pd.DataFrame) -> list[Axes]:
        function(table, tmp_path / "figure", looks(set(table["method"]) - {"placebo"}))
        (figure,) = saved
        return figure.axes

    return draw


def settings(**changes: Any) -> pd.DataFrame:
    rows = [
        {
            "direction": "de-en", "method": "se_kd_blend", "parameter": "schedule", "value": value,
            "run": f"{value}.{seed}", "seed": seed, "BLEU": bleu + seed, "kl": bleu / 10,
        }
        for value, bleu in (("linear", 20.0), ("exp", 24.0), ("step", 21.0))
        for seed in (1, 2)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**changes)


def test_settings_are_not_joined_by_lines(drawn: Drawn) -> None:
    (axis,) = drawn(sensitivity.draw_sensitivity, settings())
    lines = axis.get_lines()
    assert {line.get_linestyle() for line in lines} == {"None"}
    means = next(line for line in lines if len(line.get_xdata()) == 3)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["exp", "linear", "step"]
    assert means.get_ydata().tolist() == [25.5, 21.5, 22.5]
    assert axis.get_ylabel() == "BLEU" and axis.get_title() == ""


def test_settings_without_a_score_are_named(drawn: Drawn) -> None:
    table = settings()
    table.loc[table["value"] == "exp", "BLEU"] = np.nan
    (axis,) = drawn(sensitivity.draw_sensitivity, table)
    assert [text.get_text() for text in axis.texts] == ["no BLEU"]
    assert axis.texts[0].get_position()[0] == 0


def test_settings_without_translations_show_the_distance(drawn: Drawn) -> None:
    (axis,) = drawn(sensitivity.draw_sensitivity, settings(BLEU=np.nan))
    assert axis.get_ylabel().startswith("KL(p‖q)")
    assert any(line.get_ydata().tolist() == [2.4, 2.0, 2.1] for line in axis.get_lines())


def buckets(*runs: tuple[str, str, int, tuple[float, float]]) -> pd.DataFrame:
    """KL on easy and hard tokens of runs: direction, method, seed, and the two."""
    return pd.DataFrame(
        {
            "direction": direction, "method": method, "run": f"{direction}/{method}.{seed}",
            "family": "difficulty", "bucket": bucket, "tokens": 100, "kl": kl, "kl_low": kl - 0.5,
            "kl_high": kl + 0.5,
        }
        for direction, method, seed, values in runs
        for bucket, kl in zip(("easy", "hard"), values, strict=True)
    )  # fmt: skip


def heights(axis: Axes) -> list[list[float]]:
    """The bars of each method in a panel."""
    bars = [group for group in axis.containers if isinstance(group, BarContainer)]
    return [[bar.get_height() for bar in group] for group in bars]


def test_methods_are_compared_over_the_directions_that_all_have(drawn: Drawn) -> None:
    """Equal in de-en, a method that was not run in the easier cs-en does not look worse."""
    runs = (
        ("de-en", "word_kd", 1, (1.0, 4.0)),
        ("cs-en", "word_kd", 1, (0.5, 2.0)),
        ("de-en", "se_kd_target", 1, (1.0, 4.0)),
    )
    axis, _ = drawn(transfer.draw_transfer, buckets(*runs))
    assert heights(axis) == [[1.0, 4.0], [1.0, 4.0]]
    assert axis.figure.get_suptitle() == "de-en"


def test_directions_weigh_the_same_however_many_runs_they_have(drawn: Drawn) -> None:
    runs = [("de-en", "word_kd", seed, (1.0, 4.0)) for seed in (1, 2, 3)]
    axis, _ = drawn(transfer.draw_transfer, buckets(*runs, ("cs-en", "word_kd", 1, (0.5, 2.0))))
    assert heights(axis) == [[0.75, 3.0]]
    assert axis.figure.get_suptitle() == "mean of cs-en, de-en"


def test_methods_of_no_common_direction_have_panels_of_their_own(drawn: Drawn) -> None:
    runs = ("de-en", "word_kd", 1, (1.0, 4.0)), ("cs-en", "se_kd_target", 1, (0.5, 2.0))
    panels = drawn(transfer.draw_transfer, buckets(*runs))
    assert [axis.get_title() for axis in panels] == ["cs-en", "de-en"]
    assert [heights(axis) for axis in panels] == [[[0.5, 2.0]], [[1.0, 4.0]]]


def test_settings_are_compared_over_the_directions_that_all_have(drawn: Drawn) -> None:
    """A second direction, of higher scores, has one of three values."""
    other = settings().query("value == 'exp'").assign(direction="cs-en", BLEU=60.0)
    (axis,) = drawn(sensitivity.draw_sensitivity, pd.concat([settings(), other]))
    means = next(line for line in axis.get_lines() if len(line.get_xdata()) == 3)
    assert means.get_ydata().tolist() == [25.5, 21.5, 22.5] and axis.get_title() == "de-en"


def test_settings_of_methods_without_a_common_direction(drawn: Drawn) -> None:
    """Each in its own; another hyper-parameter of one of them alone, of which a value has no score."""
    other = settings(direction="cs-en", method="se_kd_target")
    alone = settings(parameter="beta").replace({"BLEU": {24.0 + seed: np.nan for seed in (1, 2)}})
    panels = drawn(sensitivity.draw_sensitivity, pd.concat([settings(), other, alone]))
    assert [(axis.get_xlabel(), axis.get_title()) for axis in panels if axis.axison] == [
        ("β", "de-en"), ("schedule", "cs-en"), ("schedule", "de-en"),
    ]  # fmt: skip
    names = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert names == ["SE-KD (blend)", "SE-KD (target)"]


def test_moved_tokens_are_a_mean_over_directions() -> None:
    rows = [
        ("de-en", "easy", "hard", 100), ("de-en", "hard", "hard", 300),
        ("cs-en", "easy", "hard", 30), ("cs-en", "hard", "hard", 10),
    ]  # fmt: skip
    span = pd.DataFrame(rows, columns=["direction", "from", "to", "tokens"])
    assert transitions.mean_shares(span) == {("easy", "hard"): 0.5, ("hard", "hard"): 0.5}


def scores(**changes: Any) -> pd.DataFrame:
    rows = []
    for direction, gain in (("de-en", 1.5), ("en-de", -3.0)):
        for method in ("teacher", "word_kd", "se_kd_blend"):
            own = gain if method == "se_kd_blend" else np.nan
            rows.append(
                {
                    "direction": direction, "method": method, "seed": 1, "run": f"{direction}/{method}",
                    "BLEU": 20.0, "BLEU_low": 19.0, "BLEU_high": 21.0,
                    "BLEU_gain_over_word_kd": own, "BLEU_gain_over_word_kd_low": own - 0.5,
                    "BLEU_gain_over_word_kd_high": own + 0.25, "BLEU_gain_over_finetune": np.nan,
                }
            )  # fmt: skip
    return pd.DataFrame(rows).assign(**changes)


def ends(axis: Axes) -> list[list[float]]:
    """The intervals in a panel."""
    return [path.vertices[:, 0].tolist() for item in axis.collections for path in item.get_paths()]


def test_runs_show_paired_differences(drawn: Drawn) -> None:
    first, second = drawn(quality.draw_quality, scores())
    assert ends(first) == [[1.0, 1.75]] and ends(second) == [[-3.5, -2.75]]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["word-level KD", "SE-KD (blend)"]
    assert [text.get_text() for text in first.texts] == ["20.0", "20.0"]
    assert first.get_xlabel() == "BLEU over word-level KD"
    assert first.get_xlim() == second.get_xlim()


def test_runs_without_a_baseline_show_levels(drawn: Drawn) -> None:
    first, _ = drawn(quality.draw_quality, scores(BLEU_gain_over_word_kd=np.nan))
    assert ends(first) == [[19.0, 21.0]] * 3 and first.get_xlabel() == "BLEU"


def test_a_method_without_a_partner_is_not_drawn_at_zero(drawn: Drawn) -> None:
    table = pd.DataFrame(
        {
            "direction": "de-en", "method": ["word_kd", "se_kd_blend", "se_kd_student"], "metric": "BLEU",
            "mean": [20.0, 21.0, 22.0], "gain_over_word_kd": [np.nan, 1.0, np.nan],
            "gain_over_word_kd_low": [np.nan, 0.5, np.nan],
            "gain_over_word_kd_high": [np.nan, 1.5, np.nan], "gain_over_finetune": np.nan,
            "gain_over_word_kd_seeds": [0, 3, 0],
        }
    )  # fmt: skip
    (axis,) = drawn(methods.draw_methods, table)
    texts = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert texts.pop("no run to compare with") == 2
    assert texts == {"20.00": 0, "21.00": 1, "22.00": 2}


def test_the_mean_of_the_directions_comes_last(drawn: Drawn) -> None:
    rows = [
        {"direction": direction, "method": method, "metric": "BLEU", "mean": 20.0,
         "gain_over_word_kd": gain, "gain_over_word_kd_low": gain, "gain_over_word_kd_high": gain,
         "gain_over_word_kd_seeds": seeds}
        for direction, seeds in (("all", 1), ("de-en", 1), ("en-de", 3))
        for method, gain in (("word_kd", np.nan), ("se_kd_blend", 1.0))
    ]  # fmt: skip
    panels = drawn(methods.draw_methods, pd.DataFrame(rows).assign(gain_over_finetune=np.nan))
    titles = [axis.get_title() for axis in panels if axis.axison]
    assert titles == ["de-en", "en-de", "mean of the directions"]
    # A gain of one seed does not look as sure as one of three.
    marks = [axis.containers[-1].lines for axis in panels if axis.axison]
    filled = [mark.get_markerfacecolor() != "white" for mark, _, _ in marks]
    widths = [line.get_linewidth()[0] for _, _, (line,) in marks]
    assert filled == [False, True, False] and widths[0] == widths[2] < widths[1]


def test_panels_are_as_high_as_their_rows_need(drawn: Drawn) -> None:
    rows = [
        {"direction": direction, "method": f"se_kd_target (gamma={number / 100:.2f} and more)",
         "metric": "BLEU", "mean": 20.0, "gain_over_word_kd": 1.0, "gain_over_word_kd_low": 0.5,
         "gain_over_word_kd_high": 1.5, "gain_over_word_kd_seeds": 3}
        for direction, count in (("de-en", 2), ("en-de", 12))
        for number in range(count)
    ]  # fmt: skip
    first, second = drawn(
        methods.draw_methods, pd.DataFrame(rows).assign(gain_over_finetune=np.nan)
    )
    assert first.figure.get_figheight() == pytest.approx(2 * 0.55 + 0.2 * 14)
    assert second.bbox.height > 2 * first.bbox.height


@pytest.mark.parametrize(
    ("scopes", "shown"),
    [
        ({"all": "de-en"}, ["de-en"]),
        ({"all": "de-en en-cs", "de-en": "de-en", "en-cs": "en-cs"}, ["de-en", "en-cs", "all"]),
        ({"all": "en-cs", "en-cs": "en-cs"}, ["en-cs"]),
    ],
)
def test_claims_of_one_direction_have_its_name(
    drawn: Drawn, scopes: dict[str, str], shown: list[str]
) -> None:
    row = {
        "method": "se_kd_blend",
        "claim": 1,
        "decides": True,
        "effect": 0.2,
        "low": 0.1,
        "high": 0.3,
    }
    rows = [row | {"scope": scope, "directions": names} for scope, names in scopes.items()]
    axis, *_ = drawn(claims.draw_claims, pd.DataFrame(rows))
    assert [label.get_text() for label in axis.get_yticklabels()] == shown
    assert axis.get_xlabel() == "fall of KL, nats"


def test_a_direction_with_a_log_alone_has_its_panel(drawn: Drawn) -> None:
    rows = [
        {"direction": direction, "method": "word_kd", "run": direction, "bucket": "hard",
         "source": source, "step": step, "kl": 1.0 / step}
        for direction, sources in (("de-en", ("records", "log")), ("en-de", ("log",)))
        for source in sources
        for step in (1, 2)
    ]  # fmt: skip
    first, second = drawn(training.draw_training, pd.DataFrame(rows))
    assert len(first.get_lines()) == len(second.get_lines()) == 1


def widths(folder: Path) -> dict[str, float]:
    """Of the drawings in a folder, in inches."""
    found = {}
    for path in folder.glob("*.svg"):
        size = re.search(r'<svg[^>]*\swidth="([\d.]+)pt"', path.read_text())
        found[path.stem] = round(float(size[1]) / 72, 2)
    return found


def test_widths_are_those_of_an_acl_page_and_style_changes_them(tmp_path: Path) -> None:
    settings().to_csv(tmp_path / "sensitivity.csv", index=False)
    scores().to_csv(tmp_path / "quality.csv", index=False)
    assert figures.draw_all(tmp_path) == ["quality", "sensitivity"]
    assert widths(tmp_path) == {"quality": PAGE, "sensitivity": COLUMN}
    before = (tmp_path / "quality.pdf").read_bytes()
    assert b"DejaVuSans" in before and b"DejaVuSerif" not in before
    own = tmp_path / "own.mplstyle"
    own.write_text("font.family: DejaVu Serif\nfont.size: 9\nfigure.figsize: 5.04, 3\n")
    figures.main([str(tmp_path), "--output", str(folder_of(tmp_path)), "--style", str(own)])
    assert widths(tmp_path / "report/figures") == {"quality": 5.04, "sensitivity": 2.42}
    after = (tmp_path / "report/figures/quality.pdf").read_bytes()
    assert b"DejaVuSerif" in after and b"DejaVuSans" not in after


def folder_of(tmp_path: Path) -> Path:
    """A report with the same tables."""
    (tmp_path / "report/figures").mkdir(parents=True)
    for path in tmp_path.glob("*.csv"):
        (tmp_path / "report/figures" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "report"


@pytest.mark.parametrize(("size", "label", "height"), [(None, 7.0, 2.0), (14.0, 14.0, 4.0)])
def test_font_size_scales_all_text_and_the_height(
    tmp_path: Path, size: float | None, label: float, height: float
) -> None:
    own = tmp_path / "own.mplstyle"
    own.write_text("" if size is None else f"font.size: {size}\n")
    with style.own_style(own), style.figure(PAGE, 2.0) as (whole, (axis,)):
        axis.set_xlabel("x")
        assert axis.xaxis.label.get_size() == label
        assert axis.get_xticklabels()[0].get_size() == pytest.approx(label * 6.5 / 7)
        assert whole.get_size_inches().tolist() == [PAGE, height]
    own.write_text("font.size: 14\naxes.labelsize: 8\n")
    with style.own_style(own), style.figure(PAGE, 2.0) as (_, (axis,)):
        assert axis.xaxis.label.get_size() == 8


@pytest.mark.parametrize(
    ("size", "height", "lines"), [(7, 2.0, (1, 1)), (16, 2.0, (2, 1)), (7, 1.2, (1, 2))]
)
def test_labels_longer_than_their_axes_are_not_cut_off(
    tmp_path: Path,
    size: int,
    height: float,
    lines: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(style, "FORMATS", ("svg",))
    own = tmp_path / "own.mplstyle"
    own.write_text(f"font.size: {size}\n")
    with style.own_style(own), style.figure(COLUMN, height) as (whole, (axis,)):
        axis.set_xlabel("transfer gained: fall of KL")
        axis.set_ylabel("sentence chrF gained")
        style.save(whole, tmp_path / "figure")
        whole.draw_without_rendering()
        labels = (axis.xaxis.label, axis.yaxis.label)
        assert tuple(len(label.get_text().split("\n")) for label in labels) == lines
        for label in labels:
            inside, page = label.get_window_extent(), whole.bbox
            assert page.x0 <= inside.x0 < inside.x1 <= page.x1
            assert page.y0 <= inside.y0 < inside.y1 <= page.y1


def test_a_style_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = style.own_style(tmp_path / "none.mplstyle")
    with pytest.raises(UserError, match="--style: expected a matplotlib style file"), missing:
        pass


def test_methods_that_share_a_colour_differ_in_their_marker() -> None:
    methods = [f"se_kd_{number}" for number in range(20)]
    methods += ["se_kd_0 (gamma=1)", "se_kd_0 (gamma=2)", "se_kd_8 (gamma=1)"]
    found = looks(methods)
    assert len({(look.colour, look.marker) for look in found.values()}) == len(methods)
    assert found["se_kd_0"].colour == found["se_kd_0 (gamma=1)"].colour
    systems = [f"system{number}" for number in range(20)]
    drawn = {(drawings._colour(systems, name), drawings._marker(systems, name)) for name in systems}
    assert len(drawn) == len(systems)
