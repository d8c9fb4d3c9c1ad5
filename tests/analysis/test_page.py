"""The HTML pages, in a real browser where there is one."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_compare import GOOD, POOR, REFERENCE

from analysis import compare, figures, transfer
from analysis.chapters.examples import Example, Group
from analysis.page import minus, render
from analysis.report.blocks import Section, Table
from analysis.report.document import html, markdown
from analysis.runs.simulated import write_study

HOSTILE = '<script>document.title = "owned"</script><b onclick=x>&amp; "quotes"</b>'


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study in which one sentence, and a method's translations, hold HTML."""
    root = tmp_path_factory.mktemp("study")
    write_study(root)
    for path in root.rglob("hyps/test*.txt"):
        lines = path.read_text(encoding="utf-8").splitlines()
        lines = [f"{HOSTILE} {line}" for line in lines]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:  # figures take most of the time, and two are enough
        few = {name: figures.FIGURES[name] for name in ("claims", "methods")}
        patch.setattr(figures, "FIGURES", few)
        transfer.main([str(root), "--resamples", "100"])
    return root / "report"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no chromium with its driver; Debian: apt install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def test_pages_are_self_contained_and_escaped(report: Path) -> None:
    for name in ("report.html", "examples.html"):
        text = (report / name).read_text(encoding="utf-8")
        assert "<script>document" not in text and "<b onclick" not in text
        assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
        assert all(
            part.startswith('"data:image/svg+xml;base64,') for part in text.split("src=")[1:]
        )
    assert "data:image" in (report / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;document.title" in (report / "examples.html").read_text(encoding="utf-8")
    assert "\\toprule" in (report / "tables/results.tex").read_text()
    claims = (report / "tables/claims.tex").read_text()
    assert "supported" in claims and "\\begin{table}" in claims


def test_markdown_and_cells_in_a_page_are_text(tmp_path: Path) -> None:
    table = Table(pd.DataFrame({"a": [HOSTILE]}), fold=HOSTILE)
    text = html([Section("a", HOSTILE, (HOSTILE, table))], [HOSTILE], tmp_path)
    assert "<b onclick" not in text and text.count("&lt;script&gt;") == 6


def test_columns_of_numbers_stand_at_the_right() -> None:
    cells = {
        "method": ["a", "b"],
        "n": ["1 [0, 2]", ""],
        "p": ["< 0.0001", "0.5"],
        "verdict": ["x"] * 2,
    }
    assert Table(pd.DataFrame(cells)).classes == ["", "number", "number", "verdict"]


def test_negative_numbers_have_a_minus_sign_in_the_page_alone(tmp_path: Path) -> None:
    cells = {
        "gain": ["-0.23 [-0.40, 0.10]", ""],
        "position": ["10-19", "0-4"],
        "options": ["-1", "lr -1"],
    }
    chapters = [Section("a", "A", (Table(pd.DataFrame(cells)),))]
    page = html(chapters, [], tmp_path)
    assert ">−0.23 [−0.40, 0.10]<" in page and ">10-19<" in page
    assert ">-1<" in page and ">lr -1<" in page  # no column of numbers
    assert "-0.23 [-0.40, 0.10]" in markdown(chapters, [])
    assert minus("1e-05") == "1e-05"


def test_in_a_browser(report: Path, browser: Any) -> None:
    for name in ("report.html", "examples.html"):
        browser.get((report / name).as_uri())
        assert browser.title not in ("", "owned")
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    body = browser.find_element("tag name", "body").text
    assert HOSTILE in body  # shown as text
    assert len(browser.find_elements("class name", "token")) > 10
    browser.get((report / "report.html").as_uri())
    browser.execute_script(
        "for (const part of document.querySelectorAll('details')) part.open = true"
    )
    for table in browser.find_elements("tag name", "table"):
        for head in table.find_elements("tag name", "th"):
            if head.text == "BLEU":
                column = [h.text for h in table.find_elements("tag name", "th")].index("BLEU")
                orders = []
                for _ in range(2):
                    browser.execute_script("arguments[0].click()", head)
                    cells = table.find_elements("css selector", f"td:nth-child({column + 1})")
                    orders.append([float(cell.text.split()[0]) for cell in cells])
                assert orders[0] == sorted(orders[0]) and len(orders[0]) > 1
                assert orders[1] == orders[0][::-1]
                return
    pytest.fail("no table with BLEU in the report")


@pytest.mark.parametrize("width", [1300, 800, 390])
def test_no_width_breaks_a_verdict_or_scrolls_the_page(
    report: Path, browser: Any, width: int
) -> None:
    browser.set_window_size(width, 900)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    for name in ("report.html", "examples.html"):
        browser.get((report / name).as_uri())
        wide = browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0
    browser.get((report / "report.html").as_uri())
    lines = browser.execute_script(
        "return [...document.querySelectorAll('td.verdict')].filter(cell => cell.offsetParent)"
        ".map(cell => cell.getClientRects()[0].height && getSelection && "
        "(() => {const range = document.createRange(); range.selectNodeContents(cell); "
        "return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size})())"
    )
    assert len(lines) >= 5 and max(lines) == 1
    assert "nan" not in browser.find_element("tag name", "body").text.lower().split()


def test_examples_are_filtered_in_the_page(report: Path, browser: Any) -> None:
    browser.get((report / "examples.html").as_uri())
    ready = "return document.readyState"
    while (
        browser.execute_script(ready) != "complete"
    ):  # on a busy machine some examples are not there yet
        time.sleep(0.05)

    def shown() -> list[float]:
        found = browser.find_elements("css selector", ".example:not([hidden])")
        return [float(example.get_attribute("data-change")) for example in found]

    everything = shown()
    assert min(everything) < 0 < max(everything)
    browser.execute_script(
        "document.getElementById('kind').value = 'gained';"
        "document.querySelector('.filter').dispatchEvent(new Event('input'))"
    )
    assert shown() == [change for change in everything if change > 0]
    browser.find_element("id", "text").send_keys("no such word anywhere")
    assert shown() == []
    assert browser.find_element("id", "count").text == f"0 of {len(everything)} sentences"


def test_tokens_without_text_are_told() -> None:
    told = "do not hold the text of the tokens"
    for piece in ("", "word"):
        token = {"piece": piece, "teacher": piece, "student": piece, "hard": True, "shade": 0.1,
                 "line": "blue", "before": "1.00", "after": "0.50"}  # fmt: skip
        example = Example(1, 10.0, 20.0, None, "a", "b", "c", [token])
        group = Group("de-en", "SE-KD", "word-level KD", 1, [example])
        assert (told in render("examples.html", title="", groups=[group])) == (piece == "")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two systems, of which one says what no other text does."""
    folder = tmp_path_factory.mktemp("comparison")
    for name, lines in (("ref", REFERENCE), ("poor", [*POOR[:5], "unheard"]), ("good", GOOD)):
        text = "".join(f"{line}\n" for line in lines * 6)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    files = [str(folder / f"{name}.txt") for name in ("poor", "good", "ref")]
    options = ["--resamples", "100", "--trials", "100", "--output", str(folder / "out")]
    compare.main([*files[:2], "--ref", files[2], *options])
    return folder / "out"


def test_a_comparison_has_the_filter_of_the_examples(comparison: Path, report: Path) -> None:
    pages = [comparison / "report.html", report / "examples.html"]
    scripts = [path.read_text(encoding="utf-8").split("<script>")[1] for path in pages]
    assert scripts[0].split("</script>")[0] == scripts[1].split("</script>")[0]
    assert 'id="hard"' in pages[1].read_text() and 'id="hard"' not in pages[0].read_text()
    text = pages[0].read_text(encoding="utf-8")
    assert text.count('class="example"') > 20
    assert text.count("unheard") > 5
    assert (comparison / "report.md").read_text(encoding="utf-8").count("    sentence ") == 5


def test_a_comparison_is_filtered_in_the_page(comparison: Path, browser: Any) -> None:
    browser.get((comparison / "report.html").as_uri())
    groups = browser.find_elements("css selector", "details.group")
    assert [group.get_attribute("open") for group in groups] == [None] * len(groups)
    browser.find_element("id", "text").send_keys("unheard")
    found = browser.find_elements("css selector", ".example:not([hidden])")
    assert found and all("unheard" in example.text for example in found)  # opened, so seen
    assert browser.find_element("id", "count").text.startswith(f"{len(found)} of ")
    browser.find_element("id", "text").clear()
    browser.execute_script(
        "document.getElementById('kind').value = 'lost';"
        "document.querySelector('.filter').dispatchEvent(new Event('input'))"
    )
    lost = browser.find_elements("css selector", ".example:not([hidden])")
    assert all(float(example.get_attribute("data-change")) < 0 for example in lost)
    shown = [group for group in groups if group.is_displayed()]
    assert len(shown) < len(groups)  # a group without any is hidden


def test_nothing_is_folded_or_cut_on_paper(report: Path, browser: Any) -> None:
    browser.get((report / "report.html").as_uri())
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.find_elements("css selector", "details:not([open])") == []
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.find_elements("css selector", "details[open]") == []
