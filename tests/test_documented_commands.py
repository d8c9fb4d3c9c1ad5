"""The README, the docs and the modules' docstrings: the options of every command exist; links lead somewhere."""

import ast
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from fairseq import options

import sekd_fairseq.tasks  # noqa: F401 (registers what --user-dir names)
from tests.sekd_fairseq.conftest import ROOT
from tests.sekd_fairseq.pages import PAGES, blocks, commands

FAIRSEQ = {
    "fairseq-train": options.get_training_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
    "fairseq-validate": options.get_validation_parser,
    "fairseq-preprocess": options.get_preprocessing_parser,
}


def inline(page: Path) -> list[list[str]]:
    """Commands within a sentence."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    spans = re.findall(r"`((?:python\s+-m|fairseq-)[^`]*)`", text)
    return [words for span in spans for words in commands(" ".join(span.split()))]


def of_module(path: Path) -> list[list[str]]:
    """Commands of a module's docstring, without the brackets of what may be left out."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return commands(text.replace("[", "").replace("]", ""))


SHOWN = {
    f"{page.name}: {shlex.join(words)}": words
    for page in PAGES
    for words in [*(w for block in blocks(page) for w in commands(block)), *inline(page)]
} | {
    f"{path.relative_to(ROOT)}: {shlex.join(words)}": words
    for folder in ("analysis", "sekd_fairseq")
    for path in sorted((ROOT / folder).rglob("*.py"))
    for words in of_module(path)
}


@functools.cache
def help_of(module: str) -> str:
    """What ``python -m MODULE --help`` prints."""
    out, before = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    assert end.value.code in (0, None)
    return out.getvalue()


def known(words: list[str]) -> set[str]:
    """The options of a command; of fairseq's those of what it is given the names of, too."""
    if words[0] == "python":
        return set(re.findall(r"(?<![\w-])--[\w-]+", help_of(words[2])))
    plugin = runpy.run_module("sekd_fairseq.options")["GROUPS"]
    names = {
        f"--{name.replace('_', '-')}"
        for config in plugin.values()
        for name in config.__dataclass_fields__
    }
    parser = FAIRSEQ[words[0]]()
    every = {name for action in parser._actions for name in action.option_strings}
    every |= {
        "--lr",
        "--warmup-updates",
        "--label-smoothing",
        "--remove-bpe",
        "--share-all-embeddings",
    }
    return every | names


@pytest.mark.parametrize("shown", SHOWN)
def test_its_options_exist(shown: str) -> None:
    words = SHOWN[shown]
    if words[0] == "python" and not words[2].startswith(("sekd_fairseq", "analysis")):
        pytest.skip("another project's")
    end = words.index("--") if "--" in words else len(words)
    for part in (
        words[:end],
        ["fairseq-train", *words[end + 1 :]],
    ):  # after --, as rounds takes them
        given = [word.split("=")[0] for word in part[1:] if re.match(r"--[a-z]", word)]
        assert set(given) <= known(part), (given, shown)


def test_every_page_is_read() -> None:
    assert len(SHOWN) > 15 and any(shown.startswith("README.md: fairseq-train") for shown in SHOWN)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_installs_is_here(page: Path) -> None:
    extras = set(re.findall(r"^        \"(\w+)\": \[", (ROOT / "setup.py").read_text(), re.M))
    for line in re.findall(r"^pip install (.*)$", page.read_text(encoding="utf-8"), re.M):
        options, place = re.fullmatch(r"(.*) '?(\.\S*?)'?(?:\s+#.*)?", line).groups()
        assert options == "-c constraints.txt", line
        assert set(re.findall(r"\w+", place)) <= extras, line


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900
