"""The demo's corpus: translations that belong together, and bad ones end with one line."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

DATA = Path(__file__).parents[2] / "scripts" / "data"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(DATA / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_corpus_from_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "homeassistant.whl"
    texts = {
        "en": {"a": {"b": "Turn the light on now", "c": "Battery level", "d": "Set {x} to that"}},
        "de": {"a": {"b": "Schalte jetzt das Licht an", "c": "Ladestand", "d": "Setze {x} darauf"}},
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for language, content in texts.items():
            name = f"homeassistant/components/light/translations/{language}.json"
            archive.writestr(name, json.dumps(content))
    done = run(
        "homeassistant_corpus.py", "--source-lang", "en", "--target-lang", "de", "--wheel", wheel,
        "--output", tmp_path / "text", "--summary", tmp_path / "text.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "text.de").read_text() == "Schalte jetzt das Licht an\n"
    assert json.loads((tmp_path / "text.json").read_text())["pairs"] == 1
    done = run(
        "homeassistant_corpus.py", "--source-lang", "en", "--target-lang", "xx", "--wheel", wheel,
        "--output", tmp_path / "none",
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: ")
