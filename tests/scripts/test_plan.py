"""What the pipeline's rules read, make and run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from plan import Plan, options
from snakemake.utils import update_config

from analysis.runs.errors import UserError
from analysis.runs.methods import Method

CONFIGS = Path(__file__).parents[2] / "scripts" / "configs"


def of(name: str, /, **own: Any) -> Plan:
    config = yaml.safe_load((CONFIGS / name).read_text())
    update_config(config, own)
    return Plan(config, plugin="sekd_fairseq", gpu=False)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ("methdos: {}", r"at \$: .*'methdos' was unexpected"),
        ("corpus: {limits: 5}", r"at \$\.corpus: .*'limits' was unexpected"),
        ("student: {max_update: 5}", r"at \$\.student: 'max_update' does not match"),
        ("methods: {new: {lambda-max: 0}}", r"at \$\.methods\.new: 'criterion' is a required property"),
        ("seeds: 3", r"at \$\.seeds: 3 is not of type 'array'"),
        ("seeds: [1.5]", r"at \$\.seeds\[0\]: 1\.5 is not of type"),
        ("directions: [en_de]", r"at \$\.directions\[0\]: 'en_de' does not match"),
        ("corpus: {src: a.en}", r"at \$\.corpus: 'tgt' is a dependency of 'src'"),
        ("generation: {tune-lenpen: wide}", r"at \$\.generation\['tune-lenpen'\]: 'wide' is not of type"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_a_users_error(own: str, told: str) -> None:
    with pytest.raises(UserError, match=f"configuration, {told}"):
        of("demo.yaml", **yaml.safe_load(own))


def test_files_of_two_languages_are_of_one_direction() -> None:
    """Of en-de and de-en one would read its languages the wrong way round."""
    corpus = {"src": "a.en", "tgt": "a.de"}
    both = ["en-de", "de-en"]
    with pytest.raises(UserError, match=r"corpus: .*expected one direction.* found en-de, de-en"):
        of("demo.yaml", directions=both, corpus=corpus)
    assert of("demo.yaml", corpus=corpus).corpus_inputs(job()) == ["a.en", "a.de"]
    prefixes = {"train": "a", "valid": "b", "test": "c"}
    plan = of("demo.yaml", directions=both, corpus=prefixes)
    assert plan.corpus_inputs(SimpleNamespace(direction="de-en"))[:2] == ["a.de", "a.en"]


def test_a_methods_name_may_end_as_a_seed_does() -> None:
    given = {"criterion": "cross_entropy"}
    methods: dict[str, Any] = {
        "kd_0.5": given,
        "kd_0": {**given, "warm-start": "kd_0.5"},
        "own": {**given, "warm-start": "kd_0.2"},
    }
    plan = of("demo.yaml", methods=methods)
    assert plan.warm_start(job(method="kd_0", seed=3)) == "runs/demo/en-de/kd_0.5.3"
    assert plan.warm_start(job(method="own", seed=3)) == "runs/demo/en-de/kd_0.2"  # seed 2 of kd_0
    methods["kd_0.5"] = None  # taken out here, of the study that is started from
    plan = of("demo.yaml", methods=methods)
    assert plan.warm_start(job(method="kd_0", seed=3)) == "runs/demo/en-de/kd_0.5.3"


def job(**wildcards: Any) -> Any:
    return SimpleNamespace(direction="en-de", **wildcards)


def test_options_are_those_of_the_command_line() -> None:
    given = {"lr": 0.1, "bf16": True, "fp16": False, "clip-norm": None, "adam-betas": "(0.9,0.98)"}
    assert options(given) == ["--lr", "0.1", "--bf16", "--adam-betas", "(0.9,0.98)"]


def test_a_student_is_made_from_what_its_method_needs() -> None:
    new = {
        "seq_kd": {"criterion": "cross_entropy", "targets": "distilled", "warm-start": "finetune"},
        "stored": {"criterion": "cached_kd", "stored-difficulty": "finetune"},
        "word_kd": None,
    }
    plan = of("demo.yaml", methods=new, runs="second")
    assert (
        "word_kd" not in plan.methods
        and plan.student_data(job(method="se_kd")) == "data/demo/en-de/bin"
    )
    seq_kd, stored = job(method="seq_kd", seed=2), job(method="stored", seed=2)
    assert plan.student_data(seq_kd) == "data/demo/en-de/distilled"
    assert plan.method_inputs(seq_kd) == [
        "data/demo/en-de/data.json", "data/demo/en-de/distilled.done",
        "runs/demo/en-de/finetune.2/train.done",
    ]  # fmt: skip
    assert plan.train_arguments(seq_kd, "student")[-4:] == [
        "--criterion", "cross_entropy",
        "--finetune-from-model", "runs/demo/en-de/finetune.2/checkpoints/checkpoint_best.pt",
    ]  # fmt: skip
    assert plan.method_inputs(stored)[1:] == [
        "data/demo/en-de/cache.done", "runs/second/en-de/finetune.2/difficulty.parquet",
    ]  # fmt: skip
    assert plan.score_arguments(job(run="seq_kd.2"))[-2:] == ["--method", "seq_kd"]
    # A study beside the main one has no teacher of its own.
    assert not any(run.endswith("teacher") for run in plan.run_folders)
    assert "runs/demo/en-de/teacher/train.done" in plan.everything


def test_the_teachers_translations_have_a_cache_of_their_own() -> None:
    new = {"both": {"criterion": "cached_kd", "targets": "distilled"}}
    plan = of("demo.yaml", methods=new, distill={"gold-share": 0.5, "nbest": 4})
    both = job(method="both", seed=1)
    assert plan.student_data(both) == "data/demo/en-de/distilled"
    assert plan.method_inputs(both)[1:] == [
        "data/demo/en-de/distilled.done", "data/demo/en-de/distilled-cache.done",
    ]  # fmt: skip
    assert plan.train_arguments(both, "student")[-2:] == [
        "--teacher-cache", "data/demo/en-de/distilled-cache",
    ]  # fmt: skip
    # It is compared with the teacher on the references, as every run.
    assert plan.score_arguments(job(run="both.1")) == [
        "--earlier", "--teacher-cache", "data/demo/en-de/cache", "--method", "seq_word_kd",
    ]  # fmt: skip
    new["both"]["keep-interval-updates"] = 1
    assert "--earlier" not in of("demo.yaml", methods=new).score_arguments(job(run="both.1"))
    latest = of("demo.yaml", training={"keep-interval-updates": 1})
    assert "--earlier" not in latest.score_arguments(job(run="se_kd.1"))
    assert plan.distill_arguments(both) == [
        "--gold-share", "0.5", "--nbest", "4", "--sources", "data/demo/en-de/bin",
    ]  # fmt: skip
    assert plan.distill_generate_arguments()[-2:] == ["--nbest", "4"]
    with pytest.raises(UserError, match=r"both: .*prompts of its own"):
        of("demo.yaml", methods=new, data={"teacher-template": "t.txt"})


def test_se_kd_on_the_teachers_text_is_a_method_of_its_own() -> None:
    given = {"criterion": "self_evolution_kd", "targets": "distilled"}
    plan = of("demo.yaml", methods={"own": given, "other": {**given, "integration": "blend"}})
    for method, told in (("own", "se_kd_target_seq"), ("other", "se_kd_blend_seq")):
        words = plan.score_arguments(job(run=f"{method}.1"))
        assert words[words.index("--method") + 1] == told
        assert Method.of(told).is_treatment


def test_a_training_with_patience_is_at_most_so_long() -> None:
    student = job(method="se_kd", seed=1)
    assert of("demo.yaml").updates(student, "student") == ["--total", "1600"]
    plan = of("demo.yaml", student={"patience": 5, "max-update": 30000})
    assert plan.updates(student, "student") == ["--total", "30000", "--at-most"]
    assert plan.updates(job(run="teacher"), "teacher") == ["--total", "1100"]
    assert "--patience" in plan.train_arguments(student, "student")
    own = of("demo.yaml", methods={"se_kd": {"max-update": 7}})
    assert own.updates(student, "student") == ["--total", "7"]


def test_a_methods_own_option_stands_for_the_students() -> None:
    """And null takes it out."""
    method = {"max-update": 7, "train-sentences": None}
    plan = of("demo.yaml", student={"train-sentences": 100}, methods={"se_kd": method})
    words = plan.train_arguments(job(method="se_kd", seed=1), "student")
    assert words.count("--max-update") == 1 and words[words.index("--max-update") + 1] == "7"
    assert "--train-sentences" not in words
    others = plan.train_arguments(job(method="word_kd", seed=1), "student")
    assert others[others.index("--train-sentences") + 1] == "100"


def test_the_length_penalty_is_one_for_all_or_a_runs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = job(run="se_kd.1")
    plan = of("demo.yaml")
    assert plan.penalty_inputs(run) == [] and plan.penalty_arguments(run) == ["--lenpen", "1.0"]
    plan = of("demo.yaml", generation={"lenpen": 0.6})
    assert plan.penalty_arguments(run) == ["--lenpen", "0.6"]
    plan = of("demo.yaml", generation={"lenpen": None, "beam": None, "tune-lenpen": None})
    assert plan.penalty_inputs(run) == [] and plan.penalty_arguments(run) == ["--lenpen", "1.0"]
    assert plan.beam_arguments()[-4:] == ["--nbest", "4", "--lenpen", "0"]
    assert "--beam 4" in " ".join(plan.generate_arguments("test"))
    plan = of("demo.yaml", generation={"tune-lenpen": [0.5, 1.5]})
    assert plan.penalty_inputs(run) == ["runs/demo/en-de/se_kd.1/length_penalty.json"]
    with pytest.raises(FileNotFoundError):  # which snakemake takes for "not yet"
        plan.penalty_arguments(run)
    Path("runs/demo/en-de/se_kd.1").mkdir(parents=True)
    Path("runs/demo/en-de/se_kd.1/length_penalty.json").write_text('{"best": 0.5}')
    assert plan.penalty_arguments(run) == ["--lenpen", "0.5"]
    assert plan.beam_arguments()[-4:] == ["--nbest", "4", "--lenpen", "0"]
    assert "--tune-lenpen" not in plan.generate_arguments("test")


def test_a_method_in_rounds_starts_from_one_student_of_the_main_study() -> None:
    new = {
        "by_teacher": {
            "criterion": "cached_kd", "warm-start": "finetune.1", "rounds": {"by": "teacher", "share": 0.5}
        }
    }  # fmt: skip
    plan = of("demo.yaml", methods=new, runs="second")
    student = job(method="by_teacher", seed=3)
    assert plan.method_inputs(student)[-1] == "runs/demo/en-de/finetune.1/train.done"
    words = plan.rounds_arguments(student)
    given, trained = words[: words.index("--")], words[words.index("--") + 1 :]
    assert given == [
        "--student", "runs/demo/en-de/finetune.1/checkpoints/checkpoint_best.pt", "--seed", "3",
        "--teacher", "runs/demo/en-de/teacher/checkpoints/checkpoint_best.pt",
        "--teacher-cache", "data/demo/en-de/cache", "--by", "teacher", "--share", "0.5",
    ]  # fmt: skip
    # What the command gives to fairseq-train itself is not given twice.
    assert trained[-2:] == ["--criterion", "cached_kd"]
    assert not {"--max-update", "--user-dir", "--teacher-cache"} & set(trained)
    assert plan.score_arguments(job(run="by_teacher.3"))[-2:] == ["--method", "rounds_teacher"]
    # Beside the teacher's translations instead of the references: their data and their cache.
    new["by_teacher"]["targets"] = "distilled"
    plan = of("demo.yaml", methods=new)
    assert plan.student_data(student) == "data/demo/en-de/distilled"
    assert "data/demo/en-de/distilled-cache" in plan.rounds_arguments(student)
    assert plan.score_arguments(job(run="by_teacher.3"))[-1] == "rounds_teacher"


def test_a_teacher_with_other_pieces_is_another_studys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seq_kd = {"criterion": "cross_entropy", "targets": "distilled"}
    other: dict[str, Any] = {"name": "other", "teacher": {"of": "demo"}}
    made = [
        tmp_path / name
        for name in (
            "runs/demo/en-de/teacher/train.done",
            "data/demo/en-de/cache.done",
            "data/demo/en-de/sentencepiece.model",
        )
    ]
    for path in made:  # each is asked for
        with pytest.raises(
            UserError, match=f"expected {path.relative_to(tmp_path)}, found none; make it"
        ):
            of("demo.yaml", **other)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    plan = of("demo.yaml", **other, methods={"seq_kd": seq_kd}, distill={"gold-share": 0.5})
    # The teacher reads its own data, and its translations are text, cut into the students' pieces.
    assert plan.data_of(job(run="teacher")) == "data/demo/en-de/bin"
    assert plan.data_of(job(run="se_kd.1")) == "data/other/en-de/bin"
    assert plan.student_data(job(method="seq_kd")) == "data/other/en-de/distilled"
    assert "--remove-bpe" in plan.distill_generate_arguments()
    assert "--remove-bpe" not in of("demo.yaml").distill_generate_arguments()
    assert plan.distill_arguments(job()) == [
        "--gold-share", "0.5", "--sources", "data/other/en-de/bin",
        "--sentencepiece-model", "data/other/en-de/sentencepiece.model",
    ]  # fmt: skip
    assert "runs/other/en-de/teacher" in plan.run_folders
    # The cache of its translations is built in its own pieces and aligned, as that of the references is.
    assert plan.teacher_distill_arguments(job()) == [
        "--gold-share", "0.5", "--sources", "data/demo/en-de/bin",
        "--sentencepiece-model", "data/demo/en-de/sentencepiece.model",
    ]  # fmt: skip
    rounds = {
        "rounds": {"criterion": "cached_kd", "warm-start": "finetune", "rounds": {"by": "student"}}
    }
    assert of("demo.yaml", **other, methods=rounds).in_rounds  # the pieces may be the same
    own = tmp_path / "data/other/en-de/sentencepiece.model"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"other pieces")
    with pytest.raises(UserError, match="rounds need"):
        of("demo.yaml", **other, methods=rounds)
    with pytest.raises(UserError, match="found a language model's"):
        of("demo.yaml", **other, data={"tokenizer": "gemma"})
