"""A study's commands are read by their own parsers before any of them runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from check import mistakes
from plan import Plan
from snakemake.utils import update_config

from analysis.runs.errors import UserError
from tests.sekd_fairseq.conftest import command, read_settings_once

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "scripts" / "configs"
#: Every shipped study, with the configurations that it is given after.
STUDIES = (
    "demo", "demo smoke", "gemma", "wmt22", "multi30k", "multi30k tatoeba",
    "multi30k multi30k-hyperparameters", "multi30k multi30k-shortlist",
    "multi30k multi30k-shortlist on-test", "multi30k multi30k-warm", "multi30k fair",
    "multi30k fair fair-warm", "multi30k fair fair-medium", "multi30k fair fair-medium fair-medium-warm",
    "multi30k fair other-pieces", "multi30k fair few", "multi30k fair few few-warm",
    "multi30k fair few few-sizes", "multi30k fair few few-reverse",
)  # fmt: skip
#: The studies of scripts/gpu_study.sh.
OTHERS = {"gemma-gpu", "gemma-gpu-news"}


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    read_settings_once()
    yield


def plan_of(study: str, **own: Any) -> Plan:
    config: dict[str, Any] = {}
    for name in study.split():
        update_config(config, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    update_config(config, own)
    return Plan(config, plugin=str(ROOT / "sekd_fairseq"), gpu=bool(config.get("gpu")))


def test_every_configuration_is_in_a_study() -> None:
    assert {name for study in STUDIES for name in study.split()} | OTHERS == {
        path.stem for path in CONFIGS.glob("*.yaml")
    }


@pytest.mark.parametrize(
    "studies",
    [("demo", "gemma", "wmt22"), pytest.param(STUDIES, marks=pytest.mark.slow, id="all")],
)
@pytest.mark.usefixtures("teachers_of_fair")
def test_shipped_studies_pass(
    studies: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    commands: dict[str, list[str]] = {}
    known: set[tuple[str, ...]] = set()
    for study in studies:
        for part, words in plan_of(study).commands().items():
            # Where files are is read as any text.
            key = tuple(word for word in words if not word.startswith(("runs/", "data/")))
            if key not in known:
                known.add(key)
                commands[f"{study}, {part}"] = words
    assert len(commands) > 5 * len(studies)
    assert mistakes(commands) == {}


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"criterion": "self_evolution_kdd"},
         "argument --criterion: invalid choice: 'self_evolution_kdd'; did you mean self_evolution_kd?"),
        ({"lambda-mx": 0.3}, "--lambda-mx: no such option here; did you mean --lambda-max?"),
        ({"lambda-max": "x"}, "argument --lambda-max: invalid float value: 'x'"),
        ({"schedule": "stp"}, "argument --schedule: invalid choice: 'stp'; did you mean step?"),
        ({"lambda-max": 2}, "criterion self_evolution_kd: lambda_max is a ratio, 0 or more and below 1 (in "
         "float32); found 2.0"),
        ({"select": "batch"}, "--select: expected with --criterion cached_kd alone; leave it out, or take that"),
        ({"integration": "blend", "label-smoothing": 0.1}, "--label-smoothing 0.1: has no effect with --alpha "
         "1, without cross entropy; leave it out, or change the other"),
        ({"criterion": "label_smoothed_cross_entropy", "teacher-path": "t.pt"},
         "--teacher-path t.pt: has no effect with --criterion label_smoothed_cross_entropy, which knows no "
         "teacher; expected --criterion self_evolution_kd or cached_kd, or no teacher"),
        ({"criterion": "cross_entropy"}, "--best-checkpoint-metric nll_loss: --criterion cross_entropy logs "
         "loss alone, which is the same; expected --best-checkpoint-metric loss, or --criterion "
         "label_smoothed_cross_entropy --label-smoothing 0"),
        ({"patience": 5, "validate-interval-updates": 100}, "--validate-interval-updates 100 with --patience: "
         "expected --save-interval-updates 100 --keep-interval-updates 1 beside it, found --save-interval-updates "
         "0; fairseq keeps nothing of the validations between, so the best of them would be lost"),
        ({"criterion": "cached_kd", "stored-difficulty": "finetune"}, "--stored-difficulty expects --criterion "
         "self_evolution_kd, found cached_kd, which has no difficulty"),
        ({"criterion": "cached_kd", "warm-start": "finetune", "rounds": {"share": 3}},
         "--share: expected above 0 and at most 1, found 3.0"),
        ({"criterion": "cached_kd", "warm-start": "finetune", "select": "bach", "rounds": {"share": 0.5}},
         "argument --select: invalid choice: 'bach'; did you mean batch?"),
    ],
)  # fmt: skip
def test_a_methods_mistake_is_named(own: dict[str, Any], told: str) -> None:
    plan = plan_of("demo", methods={"se_kd": own})
    part = "methods: se_kd"
    assert mistakes({part: plan.commands()[part]}) == {told: [part]}


@pytest.mark.parametrize(
    ("own", "parts", "told"),
    [
        ({"training": {"arch": "transformr"}}, "teacher, methods: se_kd",
         "argument --arch/-a: invalid choice: 'transformr'; did you mean transformer "),
        ({"training": {"max-tokens": "many"}}, "teacher, methods: se_kd",
         "argument --max-tokens: invalid int value: 'many'"),
        ({"teacher": {"clip-nrm": 1}}, "teacher", "--clip-nrm: no such option here; did you mean --clip-norm?"),
        ({"student": {"encoder-attention-heads": 7}}, "methods: se_kd",
         "AssertionError: embed_dim must be divisible by num_heads"),
        ({"student": {"encoder-embed-dim": 32}}, "methods: se_kd",
         "ValueError: --share-all-embeddings requires --encoder-embed-dim to match"),
        ({"student": {"adam-betas": "(0.9,"}}, "methods: se_kd", "SyntaxError: "),
        ({"cache": {"topk": 3}}, "cache", "--topk: no such option here; did you mean --top-k"),
        ({"cache": {"sample": 3, "top-k": 3}}, "cache", "--sample and --top-k: expected one of them"),
        ({"distill": {"nbest": 3}}, "distill", "--nbest N and --choose expect each other"),
        ({"generation": {"beam": "wide"}}, "generation", "argument --beam: invalid int value: 'wide'"),
        ({"generation": {"sampling": True}}, "generation",
         "--sampling: fairseq expects as many --nbest as --beam, found 1 and 4"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_once_with_the_parts_that_it_is_in(
    own: dict[str, Any], parts: str, told: str
) -> None:
    plan = plan_of("demo", methods={"finetune": None, "word_kd": None}, **own)
    ((message, where),) = mistakes(plan.commands()).items()
    assert message.startswith(told) and ", ".join(where) == parts


def test_a_study_with_a_mistake_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("methods: {se_kd: {lambda-mx: 1}}\n")
    words = ("--configfile", CONFIGS / "demo.yaml", "own.yaml", "-c1")
    out = command(
        "snakemake", "-s", ROOT / "scripts" / "Snakefile", *words, cwd=tmp_path, check=False
    )
    told = "configuration, methods: se_kd: --lambda-mx: no such option here; did you mean --lambda-max?"
    assert told in out.splitlines() and "Traceback" not in out
    assert not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


def test_what_was_found_right_is_not_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checker = tmp_path / "check.py"
    monkeypatch.setattr("plan.CHECK", checker)
    checker.write_text("import sys; sys.exit('se_kd' not in sys.stdin.read())\n")
    plan_of("demo").check_options()
    checker.write_text("print('cache: wrong'); print('align: too'); raise SystemExit(1)\n")
    plan_of("demo").check_options()
    for _ in range(2):  # nothing is kept of what was found wrong
        with pytest.raises(UserError, match=r"^configuration, cache: wrong; align: too$"):
            plan_of("demo", student={"lr": 1}).check_options()
    checker.write_text("1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        plan_of("demo", student={"lr": 1}).check_options()
