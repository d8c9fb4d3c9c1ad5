"""The study of a language model in a given time: its plan, its scheduler, and all of it with a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_study
import pytest
import yaml
from check import mistakes
from gpu_study import Plan, Scheduler, Step, commands_of, merged, options, parse

from tests.sekd_fairseq.conftest import read_settings_once, sentence_pairs, write_text

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "scripts" / "configs" / "gemma-gpu.yaml"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a study whose data and model are there in name."""
    (tmp_path / "data" / "bin").mkdir(parents=True)
    (tmp_path / "data" / "bin" / "test.de-en.de.idx").touch()
    (tmp_path / "model").mkdir()
    places = {"--data": "data", "--model": "model", "--output": "out"}
    return [word for key, name in places.items() for word in (key, str(tmp_path / name))]


def steps_of(arguments: list[str], **changes: Any) -> dict[str, Step]:
    config = yaml.safe_load(CONFIG.read_text()) | changes
    return {step.name: step for step in Plan(parse(arguments), config).steps()}


def test_plan_of_the_gemma_study(arguments: list[str]) -> None:
    steps = steps_of([*arguments, "--cpu"])
    # Three shared steps, seven methods of three seeds, each trained and judged, and the teacher judged.
    assert len(steps) == 3 + 2 * 7 * 3 + 1
    order = list(steps)
    assert order[:5] == ["teacher", "start", "cache", "word_kd.1", "word_kd.1.judge"]
    assert order.index("word_kd.3") < order.index("teacher.judge") < order.index("finetune.1")
    for step in steps.values():  # nothing comes before what it needs
        assert all(order.index(need) < order.index(step.name) for need in step.needs)
    blend = steps["se_kd_blend_0.25.2"]
    for words in (
        "--hf-layers 9", "--lr 0.0002", "--max-update 336", "--seed 2", "--integration blend",
        "--lambda-max 0.25", "out/work/start/checkpoints/checkpoint_best.pt",
        "--teacher-cache", "--max-tokens 8192", "--no-save-optimizer-state",
    ):  # fmt: skip
        assert words in blend.command
    assert blend.needs == ("start", "cache") and steps["finetune.1"].needs == ("start",)
    assert "--bf16" not in blend.command and blend.command.endswith("--cpu")
    assert "--max-epoch 3" in steps["teacher"].command
    assert "--hf-layers" not in steps["teacher"].command
    judge = steps["word_kd.1.judge"].command
    assert judge.index("fairseq_cli.generate") < judge.index("evaluate") < judge.index(".score ")
    assert "runs/de-en/word_kd.1" in judge
    assert "--method teacher" in steps["teacher.judge"].command
    words = {"criterion": "cached_kd"}
    one = steps_of(arguments, seeds=[7], methods={"a": words, "b": None})
    assert list(one)[3:] == ["a.7", "a.7.judge", "teacher.judge"]


def test_commands_are_read_before_the_first_step(arguments: list[str]) -> None:
    methods = {
        "a": {"criterion": "cached_kd", "divergance": "jsd"},
        "b": {"criterion": "cached_kd"},
    }
    steps = steps_of([*arguments, "--cpu"], seeds=[1], methods=methods)
    commands = commands_of(list(steps.values()))
    assert list(commands)[:3] == [
        "teacher, fairseq_cli.train", "start, fairseq_cli.train", "cache, sekd_fairseq.build_cache",
    ]  # fmt: skip
    assert len(commands) == 3 + 2 * (1 + 3) + 3
    assert commands["b.1.judge, fairseq_cli.generate"][-1] == "--cpu"  # and no > FILE
    read_settings_once()
    ((message, parts),) = mistakes(commands).items()
    assert "--divergance" in message and "--divergence" in message
    assert parts == ["a.1, fairseq_cli.train"]


def test_options_of_the_configuration() -> None:
    both = ({"lr": 0.1, "bf16": True, "clip": 1}, {"lr": 0.2, "clip": None, "flag": False})
    assert options(*both) == ["--lr", "0.2", "--bf16"]
    assert options(*both, cpu=True) == ["--lr", "0.2", "--cpu"]


def test_a_second_configuration_changes_the_first() -> None:
    first = {"seeds": [1, 2], "methods": {"a": {"x": 1}, "b": {"x": 1}}}
    both = merged(first, {"seeds": [3], "methods": {"a": {"y": 2}, "b": None}})
    assert both == {"seeds": [3], "methods": {"a": {"x": 1, "y": 2}, "b": None}}
    news = yaml.safe_load(CONFIG.with_name("gemma-gpu-news.yaml").read_text())
    config = yaml.safe_load(CONFIG.read_text())
    assert merged(config, news)["generation"] == config["generation"] | {"max-len-b": 200}


def scheduler(
    tmp_path: Path, *steps: Step, seconds: float = 60.0, jobs: int = 2, **expected: float
) -> Scheduler:
    for folder in ("logs", "marks"):
        (tmp_path / folder).mkdir(exist_ok=True)
    places = {"training": jobs, "judge": 1}
    return Scheduler(steps, tmp_path, "inputs", places, expected, time.monotonic() + seconds)


def step(tmp_path: Path, name: str, command: str, *needs: str, kind: str = "other") -> Step:
    command = f"echo {name} >> {tmp_path}/order; {command}"
    return Step(name, kind, command, (tmp_path / name,), needs)


def order_of(tmp_path: Path) -> list[str]:
    return (tmp_path / "order").read_text().split()


def test_steps_wait_for_what_they_need_and_are_done_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        step(tmp_path, "a", "sleep 0.6"),
        step(tmp_path, "c", f"test -e {tmp_path}/marks/a", "a"),
        step(tmp_path, "b", "true"),
        step(tmp_path, "bad", "echo out of memory; false"),
        step(tmp_path, "after", "true", "bad"),
    ]
    first = scheduler(tmp_path, *steps)
    first.run()
    assert first.done == {"a", "b", "c"} and first.failed == {"bad"}
    assert order_of(tmp_path)[:2] == ["a", "b"]  # c is more important than b but not ready
    out = capsys.readouterr().out
    assert "bad has failed" in out and "out of memory" in out
    # What failed is tried again, what is done is not, but for what has changed, and what follows from it.
    steps[0] = step(tmp_path, "a", "true")
    (tmp_path / "order").unlink()
    (tmp_path / "bad" / "left").touch()
    again = scheduler(tmp_path, *steps)
    assert again.done == {"b"}
    again.run()
    assert sorted(order_of(tmp_path)) == ["a", "bad", "c"]
    assert not (tmp_path / "bad" / "left").exists()


def test_a_training_that_would_not_end_in_time_is_not_begun(tmp_path: Path) -> None:
    """Nor one whose run could not be judged; a step of another kind still is. A measured time counts."""
    found = scheduler(
        tmp_path,
        step(tmp_path, "fast", "sleep 0.3", kind="student"),
        step(tmp_path, "slow", "true", kind="student"),
        step(tmp_path, "other", "true"),
        seconds=20.0,
        jobs=1,
        student=8.0,
        judge=10.0,
    )
    found.run()
    assert found.done == {"fast", "slow", "other"}  # 8 expected, 0.3 measured
    late = scheduler(
        tmp_path,
        step(tmp_path, "late", "true", kind="student"),
        step(tmp_path, "another", "true"),
        seconds=15.0,
        student=8.0,
        judge=10.0,
    )
    late.run()
    assert late.done == {"another"}


def test_judging_has_places_of_its_own(tmp_path: Path) -> None:
    judged = f"until [ -e {tmp_path}/judged ]; do sleep 0.1; done"
    found = scheduler(
        tmp_path,
        step(tmp_path, "long", judged, kind="student"),
        step(tmp_path, "next", f"test -e {tmp_path}/marks/long", kind="student"),
        step(tmp_path, "judge", f"touch {tmp_path}/judged", kind="judge"),
        jobs=1,
    )
    found.run()
    # The first two begin side by side, in either order.
    assert found.done == {"long", "judge", "next"}
    assert sorted(order_of(tmp_path)[:2]) == ["judge", "long"]


def test_time_is_up_and_nothing_is_left_behind(tmp_path: Path) -> None:
    endless = step(tmp_path, "endless", f"sleep 300 & echo $! > {tmp_path}/pid; wait")
    found = scheduler(tmp_path, endless, seconds=1.0)
    start = time.monotonic()
    found.run()
    assert time.monotonic() - start < 8 and not found.done and not found.failed
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in state_of(child):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the step's child is still there")


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def test_an_interrupt_stops_the_steps(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = step(tmp_path, "endless", "exec sleep 300")
    monkeypatch.setattr(Plan, "steps", lambda self: [endless])
    handler = signal.getsignal(signal.SIGTERM)

    def interrupt(self: Scheduler) -> None:
        if self.running:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Scheduler, "_collect", interrupt)
    try:
        with pytest.raises(SystemExit, match="goes on"):
            gpu_study.main([*arguments, "--minutes", "9"])
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_wrong_use_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such folder"):
        gpu_study.main([*arguments, "--data", str(tmp_path / "none")])
    (tmp_path / "data" / "bin" / "test.de-en.de.idx").unlink()
    with pytest.raises(SystemExit, match="prepare_llm_data"):
        gpu_study.main(arguments)


# All of it, on the CPU.


def tiny(folder: Path) -> tuple[Path, Path]:
    """Data, and a random Llama of four layers."""
    sentencepiece = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    for seed, (split, count) in enumerate({"train": 60, "valid": 9, "test": 12}.items()):
        write_text(folder / "text", split, sentence_pairs(count, seed))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text" / "train.de"), model_prefix=str(folder / "spm"), vocab_size=330,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    splits = [word for s in ("train", "valid", "test") for word in (f"--{s}", folder / "text" / s)]
    prepare = [
        sys.executable, "-m", "sekd_fairseq.prepare_llm_data", "--tokenizer", folder / "spm.model",
        *splits, "--source-lang", "en", "--target-lang", "de", "--output", folder / "data",
    ]  # fmt: skip
    subprocess.run(prepare, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    rows = len(sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model")))
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    return folder / "data", folder / "model"


@pytest.mark.slow
def test_a_whole_study_with_a_tiny_model(tmp_path: Path) -> None:
    """Through its command: what is made, that it goes on, and that it reports on what there is."""
    data, model = tiny(tmp_path)
    config = yaml.safe_load(CONFIG.read_text())
    config["seeds"], config["jobs"] = [2], {"training": 2, "judge": 1}
    config["methods"] = {key: config["methods"][key] for key in ("word_kd", "finetune")} | {
        "se_kd_blend_0.25": config["methods"]["se_kd_blend_0.25"]
    }
    config["training"] |= {"max-tokens": 600}
    config["cache"] |= {"top-k": 8, "allow-implausible": True}
    config["generation"] |= {"max-len-b": 12, "beam": 2}
    config["teacher"] |= {"lr": 0.003}
    config["start"] |= {"lr": 0.003, "hf-layers": 2}
    config["student"] |= {"lr": 0.003, "hf-layers": 2, "max-update": 4}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    command = [
        "bash", ROOT / "scripts" / "gpu_study.sh", "--data", data, "--model", model, "--output",
        tmp_path / "out", "--config", tmp_path / "tiny.yaml", "--cpu",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def run(*extra: object) -> str:
        done = subprocess.run(
            [*command, *extra], env=environment, stdout=subprocess.PIPE, text=True, timeout=1800,
            cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    out = run()
    assert "failed" not in out and "report on 4 runs" in out
    runs = tmp_path / "out" / "runs" / "en-de"
    record = json.loads((runs / "se_kd_blend_0.25.2" / "run.json").read_text())
    assert record["method"] == "se_kd_blend" and record["seed"] == 2 and record["updates"] == 4
    found = {key: record["hyperparameters"]["criterion"][key] for key in ("alpha", "lambda_max")}
    assert found == {"alpha": 1.0, "lambda_max": 0.25}
    assert record["hyperparameters"]["warm_start"]
    assert len((runs / "word_kd.2" / "hyps" / "test.txt").read_text().splitlines()) == 12
    assert "test" in json.loads((runs / "word_kd.2" / "scores.json").read_text())
    assert list((runs / "word_kd.2" / "tokens" / "test").glob("*.parquet"))
    report = (tmp_path / "out" / "runs" / "report" / "report.md").read_text()
    assert "SE-KD (blend)" in report
    # Nothing but the run that is gone is done again.
    (tmp_path / "out" / "work" / "marks" / "word_kd.2.judge").unlink()
    out = run("--minutes", "10")
    begun = [line.split()[2] for line in out.splitlines() if line.endswith(" begins")]
    assert begun == ["word_kd.2.judge"]
