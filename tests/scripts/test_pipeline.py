"""The pipeline's plan, its progress lines, and the demo's handling of its arguments."""

import importlib.util
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema  # noqa: F401 (this and the next three: imported before forking)
import pytest
import smart_open  # noqa: F401
import snakemake.cli
import snakemake.report.html_reporter  # noqa: F401
import torch
import train
import yaml
from progress import describe, follow, parse_line
from train import check_inputs

from sekd_fairseq import run_lock
from tests.sekd_fairseq.conftest import command, sentence_pairs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "scripts" / "configs"
SMOKE = CONFIGS / "smoke.yaml"


def plan(
    config: str,
    cwd: Path,
    *overrides: str,
    options: Sequence[str | Path] = ("-c2",),
    check: bool = True,
) -> str:
    write_texts(cwd, config)
    words = ["--configfile", CONFIGS / config, *options]
    words += ["--config", *overrides] if overrides else []
    return command(
        "snakemake", "--dry-run", "-s", ROOT / "scripts" / "Snakefile", *words, cwd=cwd, check=check
    )


def write_texts(cwd: Path, config: str) -> None:
    """Empty files where a configuration says that its text is."""
    settings = yaml.safe_load((CONFIGS / config).read_text())
    corpus = settings["corpus"]
    for subset in ("train", "valid", "test") if corpus.get("train") else ():
        for direction in settings["directions"]:
            names = corpus[subset]
            names = names[direction] if isinstance(names, dict) else names
            for name in names.split(","):
                for language in direction.split("-"):
                    path = cwd / corpus.get("folder", "") / f"{name}.{language}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()


def test_plan_of_the_demo(tmp_path: Path) -> None:
    out = plan("demo.yaml", tmp_path)
    jobs = jobs_of(out)
    assert jobs["student"] == "3" and jobs["teacher"] == "1" and jobs["total"] == "21"
    assert jobs["translate"] == jobs["evaluate"] == jobs["score"] == "4"


def test_plan_for_own_text_more_directions_and_seeds(tmp_path: Path) -> None:
    (tmp_path / "a b.en").write_text("x\n")
    (tmp_path / "a b.de").write_text("y\n")
    out = plan(
        "demo.yaml", tmp_path, "name=mine", f"corpus={{src: '{tmp_path}/a b.en', tgt: '{tmp_path}/a b.de'}}"
    )  # fmt: skip
    assert "corpus" not in out.split() and "prepare" in out
    out = plan("demo.yaml", tmp_path, "directions=['en-de','de-en']", "seeds=[1,2,3]")
    jobs = jobs_of(out)
    assert jobs["student"] == "18" and jobs["teacher"] == "2"


def test_plans_of_the_large_studies(tmp_path: Path) -> None:
    out = plan("multi30k.yaml", tmp_path)
    assert jobs_of(out)["total"] == "218"
    out = plan("gemma.yaml", tmp_path, options=("-c1", "-p"))
    assert jobs_of(out)["student"] == "12" and "corpus" not in jobs_of(out)
    for words in (
        "prepare_llm_data", "--teacher-shots 4", "import_hf gemma", "--prune-vocab",
        "build_cache data/gemma/de-en/teacher",
    ):  # fmt: skip
        assert words in out
    assert "--bpe" not in out and "--remove-bpe" not in out
    # The student reads other data than its teacher.
    assert out.count("-- data/gemma/de-en/bin") == 12


def test_plans_of_studies_beside_the_main_one(tmp_path: Path) -> None:
    """They take the main study's data, teacher, cache and, for a warm start, students."""
    out = plan(
        "multi30k.yaml", tmp_path, options=(CONFIGS / "multi30k-hyperparameters.yaml", "-c2", "-p")
    )
    jobs = jobs_of(out)
    assert jobs["teacher"] == jobs["cache"] == jobs["distill"] == jobs["prepare"] == "1"
    assert jobs["student"] == jobs["evaluate"] == jobs["score"] == "38"
    assert "--gen-subset valid" in out and "--gen-subset test" not in out
    assert out.count("--subset valid") == 2 * 38 + 1  # evaluated, scored, reported
    assert "--save-dir runs/multi30k-hyperparameters/de-en/student_beta_0.1/checkpoints" in out
    assert (
        "analysis.transfer runs/multi30k-hyperparameters --subset valid"
        " --output runs/multi30k-hyperparameters/report-valid"
    ) in out
    assert jobs["difficulty"] == "1"  # of the fine-tuned student, for two variants
    kept = "runs/multi30k-hyperparameters/de-en/finetune.1/difficulty.parquet"
    assert out.count(f"--stored-difficulty {kept}") == 2
    main = tmp_path / "runs" / "multi30k" / "de-en"
    for seed in (1, 2, 3):
        (main / f"finetune.{seed}").mkdir(parents=True)
        (main / f"finetune.{seed}" / "train.done").touch()
    out = plan("multi30k.yaml", tmp_path, options=(CONFIGS / "multi30k-warm.yaml", "-c2", "-p"))
    assert jobs_of(out)["student"] == "12" and "--max-update 600" in out
    start = "--finetune-from-model runs/multi30k/de-en/finetune.2/checkpoints/checkpoint_best.pt"
    assert out.count(start) == 4
    out = plan(
        "multi30k.yaml", tmp_path, options=(CONFIGS / "multi30k-shortlist.yaml", "-c2", "-p")
    )
    assert jobs_of(out)["student"] == "30" and "score.valid.done" in out
    assert "--output runs/multi30k-shortlist/report-valid" in out
    medium = main.parent.parent / "fair-medium" / "de-en" / "finetune.1"
    medium.mkdir(parents=True)
    (medium / "train.done").touch()
    names = ("fair.yaml", "fair-medium.yaml", "fair-medium-warm.yaml")
    out = plan(
        "multi30k.yaml", tmp_path, options=(*(CONFIGS / name for name in names), "-c2", "-p")
    )
    start = "runs/fair-medium/de-en/finetune.1/checkpoints/checkpoint_best.pt"
    assert out.count(f"--finetune-from-model {start}") == 9 and out.count(f"--student {start}") == 3
    assert "--save-dir runs/fair-medium-warm/de-en/seq_word_kd.3/checkpoints" in out
    assert "--path runs/fair/de-en/teacher/checkpoints/checkpoint_best.pt" in out
    assert out.count("--encoder-embed-dim 128") == 12
    second = (CONFIGS / "multi30k-shortlist.yaml", CONFIGS / "on-test.yaml")
    out = plan("multi30k.yaml", tmp_path, options=(*second, "-c2", "-p"))
    assert "score.test.done" in out and "--output runs/multi30k-shortlist/report\n" in out


def test_plan_of_a_study_with_other_pieces(tmp_path: Path) -> None:
    own = (CONFIGS / "fair.yaml", CONFIGS / "other-pieces.yaml", "-c2", "-p")
    line = plan("multi30k.yaml", tmp_path, options=own, check=False)
    assert "teacher: {of: fair}: expected runs/fair/de-en/teacher/train.done, found none" in line
    data, runs = tmp_path / "data" / "fair" / "de-en", tmp_path / "runs" / "fair" / "de-en"
    for path in (runs / "teacher/train.done", data / "cache.done", data / "sentencepiece.model"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    out = plan("multi30k.yaml", tmp_path, options=(*own, "--default-resources", "gpu=1"))
    jobs = jobs_of(out)
    assert jobs["prepare"] == jobs["cache"] == jobs["distill"] == jobs["teacher"] == "1"
    assert out.count("gpu=0") == 2  # the copy of a teacher, and the aligned cache
    assert jobs["student"] == "9" and jobs["length_penalty"] == jobs["score"] == "10"
    assert "build_cache" not in out and "--top-k" not in out and "--vocab-size 2000" in out
    assert (
        "align_cache data/fair/de-en/cache --data data/fair/de-en/bin --student-data data/other-pieces/de-en/bin"
        " --output data/other-pieces/de-en/cache"
    ) in out
    assert out.count("--teacher-cache data/other-pieces/de-en/cache") == 3 + 9  # trained, scored
    assert out.count("-- data/other-pieces/de-en/distilled ") == 3
    assert out.count("--max-update 1200") == 9 and "--patience" not in out


@pytest.mark.usefixtures("teachers_of_fair")
def test_plan_of_a_study_with_few_references(tmp_path: Path) -> None:
    few = (CONFIGS / "fair.yaml", CONFIGS / "few.yaml")
    out = plan("multi30k.yaml", tmp_path, options=(*few, "-c2", "-p"))
    jobs = jobs_of(out)
    assert (
        jobs["student"] == "42"
        and jobs["teacher_distilled_cache"] == jobs["distilled_cache"] == "2"
    )
    assert "--train-sentences 3000" in out
    assert (
        out.count("-- data/few/de-en/distilled ") == out.count("-- data/few/en-cs/distilled ") == 9
    )
    assert (
        "align_cache data/few/de-en/teacher-distilled-cache --data data/few/de-en/teacher-distilled"
        " --student-data data/few/de-en/distilled --output data/few/de-en/distilled-cache"
    ) in out
    assert out.count("--teacher-cache data/few/de-en/distilled-cache") == 6
    for seed in (1, 2, 3):
        made = tmp_path / "runs" / "few" / "de-en" / f"seq_kd.{seed}" / "train.done"
        made.parent.mkdir(parents=True)
        made.touch()
    warm = CONFIGS / "few-warm.yaml"
    methods = [own for own in yaml.safe_load(warm.read_text())["methods"].values() if own]
    students = sum("rounds" not in own for own in methods)
    out = plan("multi30k.yaml", tmp_path, options=(*few, warm, "-c2", "-p"))
    jobs = jobs_of(out)
    assert jobs["student"] == str(3 * students) and jobs["rounds"] == "3"
    start = "runs/few/de-en/seq_kd.2/checkpoints/checkpoint_best.pt"
    assert out.count(f"--finetune-from-model {start}") == students >= 2
    assert out.count(f"--student {start}") == 1
    assert "sekd_fairseq.rounds data/few/de-en/distilled" in out and "--train-sentences" not in out


@pytest.mark.slow
def test_a_study_with_other_pieces(tmp_path: Path) -> None:
    """Made whole: the teacher's study, as far as it is needed, and students with fewer pieces."""
    pairs = list(dict.fromkeys(sentence_pairs(500, seed=3)))
    for number, language in enumerate(("en", "de")):
        text = "".join(f"{pair[number]}\n" for pair in pairs)
        (tmp_path / f"text.{language}").write_text(text)
    base: dict[str, Any] = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    base["corpus"] = {"src": "text.en", "tgt": "text.de"}
    base["data"] = {"vocab-size": 60, "valid-size": 30, "test-size": 30}
    for kind in ("teacher", "student"):
        base[kind] |= {"max-update": 12, "warmup-updates": 4}
    base["cache"] = {"allow-implausible": True}
    base["generation"] = {"beam": 2, "max-len-b": 20}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    distilled = {"criterion": "label_smoothed_cross_entropy", "targets": "distilled"}
    own = {
        "name": "other",
        "data": {"vocab-size": 30},
        "teacher": {"of": "demo"},
        "distill": {"gold-share": 0.5},
        "methods": {
            "se_kd": None,
            "seq_kd": distilled,
            "seq_word_kd": {"criterion": "cached_kd", "targets": "distilled"},
        },
    }
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(own))
    run = ("snakemake", "-s", ROOT / "scripts" / "Snakefile", "-c1", "--configfile", "base.yaml")
    teacher = ("runs/demo/en-de/teacher/train.done", "data/demo/en-de/cache.done")
    command(*run, "--", *teacher, cwd=tmp_path, fresh=True)
    command(*run, "other.yaml", cwd=tmp_path, fresh=True)
    report = (tmp_path / "runs/other/report/report.md").read_text()
    for method in ("word-level kd", "sequence-level kd", "sequence- and word-level kd"):
        assert method in report.lower()
    symbols = [
        (tmp_path / f"data/{name}/en-de/bin/dict.de.txt").read_text() for name in ("demo", "other")
    ]
    assert symbols[0] != symbols[1]
    assert "Nothing to be done" in command(*run, "other.yaml", cwd=tmp_path, fresh=True)


def test_a_study_of_a_part_of_the_training_set_lies_beside_the_main_one(tmp_path: Path) -> None:
    own = ("runs=multi30k-2000", "student={train-sentences: 2000}")
    out = plan("multi30k.yaml", tmp_path, *own, options=("-c2", "-p"))
    students = [line for line in out.splitlines() if "/checkpoints --log-file" in line]
    students = [line for line in students if "/teacher/" not in line]
    assert students and all("--train-sentences 2000" in line for line in students)
    assert all("--save-dir runs/multi30k-2000/" in line for line in students)
    assert out.count("--train-sentences") == len(students)  # the teacher is that of all


def test_plan_of_chinese_to_english(tmp_path: Path) -> None:
    own = (CONFIGS / "tatoeba.yaml", "-c2", "-p")
    for subset in ("train", "valid", "test"):
        (tmp_path / f"{subset}.zh.gz").touch()  # compressed or not
        (tmp_path / f"{subset}.en").touch()
    out = plan("multi30k.yaml", tmp_path, f"corpus={{folder: {tmp_path}}}", options=own)
    assert jobs_of(out)["teacher"] == "1" and jobs_of(out)["student"] == "12"
    test = f"--test {tmp_path}/test --source-lang zh --target-lang en --vocab-size 8000"
    assert test in out


def test_a_configuration_takes_out_an_option_of_another(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("training: {clip-norm: null, share-all-embeddings: false}\n")
    out = plan("demo.yaml", tmp_path, options=(own, "-c1", "-p"))
    assert "train.py" in out and "--optimizer adam" in out
    assert "--clip-norm" not in out and "--share-all-embeddings" not in out


def test_methods_whose_names_differ_by_a_dot(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    methods = {name: {"criterion": name} for name in ("kd_0", "kd_0.5", "kdx0")}
    own.write_text(yaml.safe_dump({"methods": methods}))
    out = plan("demo.yaml", tmp_path, options=(own, "-c1", "-p"))
    for name in methods:
        (line,) = [line for line in out.splitlines() if f"/{name}.1/checkpoints --log" in line]
        assert f"--criterion {name} " in line and " --seed 1 " in line


def test_the_smoke_run_is_the_demo_made_small(tmp_path: Path) -> None:
    out = plan("demo.yaml", tmp_path, options=(SMOKE, "-c2", "-p"))
    assert jobs_of(out)["total"] == "21" and "--limit 3000" in out and "--vocab-size 1000" in out
    assert out.count("--total 150 ") == 4 and "--encoder-embed-dim 128" in out


def test_a_wrong_configuration_is_named(tmp_path: Path) -> None:
    """Before anything is planned, and without a traceback (test_plan.py has what is wrong)."""
    (tmp_path / "own.yaml").write_text("methdos: {}\n")
    out = plan("demo.yaml", tmp_path, options=(tmp_path / "own.yaml", "-c1"), check=False)
    assert "'methdos' was unexpected" in out and "Traceback" not in out, out


def test_plan_with_a_length_penalty_for_each_run(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("generation: {tune-lenpen: [0.5, 1.5], beam: 3}\n")
    options = (tmp_path / "own.yaml", "-c1", "-p")
    out = plan("demo.yaml", tmp_path, options=options)
    assert jobs_of(out)["length_penalty"] == jobs_of(out)["translate"] == "4"
    assert out.count("--gen-subset valid --remove-bpe sentencepiece --beam 3") == 0
    assert out.count("--nbest 3 --lenpen 0") == 4 and out.count("--values 0.5 1.5") == 4
    assert out.count("--lenpen <TBD>") == 0 and "--tune-lenpen" not in out
    run = tmp_path / "runs" / "demo" / "en-de" / "teacher"
    run.mkdir(parents=True)
    (run / "length_penalty.json").write_text('{"best": 1.5}')
    out = plan("demo.yaml", tmp_path, options=options)
    assert out.count(" --lenpen 1.5") == 2  # translated, and recorded


def test_plan_for_gpus_and_a_cluster(tmp_path: Path) -> None:
    out = plan("wmt22.yaml", tmp_path, options=("-c2", "-p"))
    assert jobs_of(out)["total"] == "218"
    assert " --cpu" not in out and "--lora-r 16" in out and "--top-p 0.98" in out
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("snakemake-executor-plugin-slurm is not installed")
    out = plan("wmt22.yaml", tmp_path, options=("--profile", ROOT / "scripts" / "slurm"))
    assert jobs_of(out)["total"] == "218"
    assert "slurm_partition=gpu" in out and "gpu=1" in out and "gpu=0" in out


def test_a_failed_step_is_asked_for_again(tmp_path: Path) -> None:
    """Its output is gone, and what was made of an earlier one stays: that must not pass for done."""
    out = plan("demo.yaml", tmp_path)
    marks = outputs(out, tmp_path)
    assert len(marks) == 20
    for order, path in enumerate(sorted(marks, key=rank)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
        os.utime(path, (1e9 + order, 1e9 + order))
    assert "Nothing to be done" in plan("demo.yaml", tmp_path)
    for path in {rank(path): path for path in marks}.values():  # one of each step
        path.rename(path.with_name("aside"))
        assert "reason: Missing output files" in plan("demo.yaml", tmp_path), path
        path.with_name("aside").rename(path)


def test_copied_runs_are_taken_for_done_after_touch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``cp -r`` gives files the times of the copy: everything would be made again."""
    made = outputs(plan("demo.yaml", tmp_path), tmp_path)
    for order, path in enumerate(sorted(made, key=rank)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
        os.utime(path, (1e9 - order, 1e9 - order))
    (tmp_path / "runs/demo/report/report.md").unlink()  # this one is still to be made
    assert jobs_of(plan("demo.yaml", tmp_path))["student"] == "3"
    words = ("-s", ROOT / "scripts" / "Snakefile", "--configfile", CONFIGS / "demo.yaml", "-c1")
    command("snakemake", *words, "--touch", "--no-hooks", cwd=tmp_path)
    jobs = jobs_of(plan("demo.yaml", tmp_path))
    assert jobs["report"] == "1" and jobs["total"] == "2"  # and the rule of all
    # Looked at where there is a GPU, from another environment.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "executable", "/elsewhere/python")
    assert jobs_of(plan("demo.yaml", tmp_path)) == jobs


def test_jobs_side_by_side_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "pipeline").symlink_to(ROOT / "scripts" / "pipeline")
    rules = (ROOT / "scripts" / "Snakefile").read_text()
    each = "\n".join(
        f'rule seen_{job}:\n    output: "{job}.txt"\n    shell:\n'
        f'        "echo ${{{{CUDA_VISIBLE_DEVICES:-all}}}} > {{output}}; touch {job}.begun;"'
        f' "for i in $(seq 600); do [ -e {other}.begun ] && exit; sleep 0.1; done"\n'
        for job, other in (("a", "b"), ("b", "a"))
    )
    (scripts / "Snakefile").write_text(f"{rules}\n\n{each}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a folder"))
    (tmp_path / "a folder").mkdir()

    def given(cores: int) -> list[str]:
        for job in "ab" if cores > 1 else "":  # each waits for the other
            (tmp_path / f"{job}.begun").unlink(missing_ok=True)
        words = ("-s", scripts / "Snakefile", "--configfile", CONFIGS / "demo.yaml", f"-c{cores}")
        words += ("--no-hooks", "--force", "a.txt", "b.txt")  # options are not checked
        command("snakemake", *words, cwd=tmp_path)
        return sorted((tmp_path / f"{job}.txt").read_text().strip() for job in "ab")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert given(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert given(2) == ["3", "7"]
    assert given(1) == ["3,7", "3,7"]  # a job alone has all


#: Steps in the order in which they are made, by the end of an output's name.
ORDER = ("raw/en-de.json", "data.json", "teacher/train.done", "cache.done", "train.done", "test.out",
         "test.txt", "score.test.done", "report.md")  # fmt: skip


def outputs(plan: str, folder: Path) -> list[Path]:
    """The files that the jobs of a plan make."""
    lines = [line for line in plan.splitlines() if "output: " in line]
    return [folder / word.rstrip(",") for line in lines for word in line.split()[1:]]


def rank(path: Path) -> int:
    """Place of an output in :data:`ORDER`."""
    return next(i for i, name in enumerate(ORDER) if path.as_posix().endswith(name))


def test_a_run_is_not_continued_with_other_inputs(tmp_path: Path) -> None:
    data, teacher, run = (tmp_path / name for name in ("data.json", "cache.done", "run"))
    for path in (data, teacher):
        path.write_text("{}")
    run.mkdir()

    def begin(*inputs: Path) -> str:
        try:
            check_inputs(run, inputs)
        except SystemExit as error:
            return str(error.code)
        return ""

    assert begin(data) == begin(data, teacher) == ""  # nothing was trained with the first
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "checkpoint_last.pt").touch()
    assert begin(data, teacher) == ""
    told = f"error: {run}: begun with other inputs (other now: "
    assert begin(data).startswith(f"{told}{teacher}); delete the folder")
    data.write_text('{"sentences": 1}')
    assert begin(data, teacher).startswith(f"{told}{data});")


def test_a_run_is_trained_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = tmp_path / "data.json", tmp_path / "a run"
    data.write_text("{}")
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    monkeypatch.setattr("sys.argv", ["train.py", str(run), str(data), "--", "--lr", "0.1"])
    called = []

    def become(program: str, words: list[str]) -> None:
        """Where another program would take this one's place: a second one comes meanwhile."""
        called.append(words[1:])
        with pytest.raises(SystemExit, match=f"error: {run}: .*found process {os.getpid()} on "):
            train.main()

    monkeypatch.setattr(os, "execv", become)
    train.main()
    assert called == [["-m", "fairseq_cli.train", "--lr", "0.1"]]
    # The lock goes on to that program.
    seen = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    check = [sys.executable, "-c", seen, str(run / run_lock.NAME)]

    def really_become(program: str, words: list[str]) -> None:
        child = os.fork()
        if child == 0:
            os.execve(program, [program, "-c", "import time; time.sleep(60)"], dict(os.environ))
        children.append(child)

    children: list[int] = []
    monkeypatch.setattr(os, "execv", really_become)
    train.main()
    locked = subprocess.run(check, capture_output=True, text=True)
    assert "BlockingIOError" in locked.stderr
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    assert subprocess.run(check).returncode == 0


def jobs_of(plan: str) -> dict[str, str]:
    """How many jobs of each rule a plan has."""
    return dict(line.split()[:2] for line in plan.splitlines() if len(line.split()) == 2)


def test_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = '2026 | INFO | train_inner | {"epoch": 3, "loss": "4.2", "num_updates": "110"}\n'
    record = parse_line(line)
    assert record is not None
    text = describe(record, total=210, first=(10, 0.0), now=50.0)
    assert text == "update 110 of 210, epoch 3, loss 4.200, 0:50 left"
    text = describe(record, total=1210, first=(10, 0.0), now=50.0, at_most=True)
    assert text == "update 110 of at most 1,210, epoch 3, loss 4.200, at most 9:10 left"
    assert parse_line("no record {") is None and parse_line('{"num_updates": ') is None
    log = tmp_path / "train.log"
    follow(io.StringIO(line + "ValueError: bad\n"), "x", 210, log)
    assert log.read_text().endswith("bad\n")
    assert "stopped before its end" in (shown := capsys.readouterr().out) and "bad" in shown
    follow(io.StringIO("| done training in 3 seconds\n"), "x", 210, log)
    assert "trained in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--src", "a"], "belong together"),
        (["--src", "a", "--tgt", "b"], "--source-lang"),
        (
            ["--src", "a", "--tgt", "b", "--source-lang", "en", "--target-lang", "de"],
            "/a: expected",
        ),
        (["--fast"], "unknown option --fast"),
        (["--name", "a/b"], "--name"),
        (["--name"], "expects a value"),
    ],
)
def test_demo_refuses_wrong_arguments(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "demo.sh", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
