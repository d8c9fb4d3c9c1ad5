"""The HTML pages, in a real browser where there is one."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis import page, transfer
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
        assert "src=" not in text
    assert "<svg" in (report / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;document.title" in (report / "examples.html").read_text(encoding="utf-8")
    assert "\\toprule" in (report / "tables/results.tex").read_text()
    claims = (report / "tables/claims.tex").read_text()
    assert "supported" in claims and "\\begin{table}" in claims


def test_markdown_in_a_page_is_text(tmp_path: Path) -> None:
    text = page.report_page(f"# A\n\n| a |\n| --- |\n| {HOSTILE} |\n\n{HOSTILE}\n", tmp_path, "t")
    assert "<b onclick" not in text and text.count("&lt;script&gt;") == 2


def test_in_a_browser(report: Path, browser: Any) -> None:
    for name in ("report.html", "examples.html"):
        browser.get((report / name).as_uri())
        assert browser.title not in ("", "owned")
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    body = browser.find_element("tag name", "body").text
    assert HOSTILE in body  # shown as text
    assert len(browser.find_elements("class name", "token")) > 10
    browser.get((report / "report.html").as_uri())
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
