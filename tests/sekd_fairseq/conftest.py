"""A small translation task that trains in seconds, and ways to run fairseq on it."""

import copy
import functools
import gc
import logging
import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import fairseq.quantization_utils  # noqa: F401 (to load a model imports it; imported before forking)
import pytest
import sentencepiece
import torch
import torch._dynamo  # an optimiser imports it, which takes a second (imported before forking)
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from filelock import FileLock
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

import sekd_fairseq.tasks  # noqa: F401 (imported before forking)

ROOT = Path(__file__).parents[2]
WORDS = {
    "one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs",
    "seven": "sieben", "eight": "acht", "nine": "neun", "ten": "zehn", "and": "und", "a": "ein",
}  # fmt: skip
PYTHON = sys.executable  # in a child that runs a page's block another program stands for it
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "PYTHONWARNINGS": "ignore",
}
# Under a limit of file size, coverage cannot write what it measured either.
needs_whole_disk = pytest.mark.skipif("COVERAGE_RUN" in os.environ, reason="not under coverage")


def completed(
    *arguments: object, cwd: Path = ROOT, fresh: bool = False, one_stream: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ...`` to its end; ``one_stream`` prints the errors among the output.

    In a fork of this process, which has imported fairseq already (that takes 7 seconds), or in a
    ``fresh`` interpreter, as a user does.
    """
    words = list(map(str, arguments))
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = fork_module(words, cwd, output, output if one_stream else errors, fresh)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, status, output.read(), errors.read())


def command(*arguments: object, check: bool = True, cwd: Path = ROOT, fresh: bool = False) -> str:
    """What :func:`completed` prints, both streams; it must succeed, or with ``check=False`` fail."""
    done = completed(*arguments, cwd=cwd, fresh=fresh, one_stream=True)
    assert (done.returncode == 0) == check, done.stdout[-3000:]
    return done.stdout


def start_command(*arguments: object, output: Path = Path(os.devnull)) -> int:
    """Start ``python -m ...`` in a fork, its output in a file or dropped; returns the process id."""
    with output.open("w") as stream:
        return fork_module(list(map(str, arguments)), ROOT, stream, stream)


def fork_module(
    words: list[str], cwd: Path, output: IO[str], errors: IO[str], fresh: bool = False
) -> int:
    """Fork a child that becomes ``python -m words``; returns its process id."""
    # A fork of a process that has used CUDA cannot use it.
    fresh = fresh or torch.cuda.is_initialized()
    if not fresh:
        read_settings_once()
    child = os.fork()
    if child == 0:
        run_module(words, cwd, output, errors, fresh)
    return child


@functools.cache
def read_settings_once() -> None:
    """Read a training's settings, before forking: the parsers of hydra build their tables at the first
    use, a third of the time of a tiny training.

    fairseq gives hydra each of its three hundred settings as text, most of them the same in every
    command, and hydra copies the store of all configurations at each reading. The forks know the texts
    that were parsed here, and read the store as it is: what is loaded from it is a copy anyway.
    """
    parse = functools.cache(OverridesParser.create().parse_rule)
    OverridesParser.parse_rule = lambda _, text, rule: copy.copy(parse(text, rule))
    ConfigStore.__deepcopy__ = lambda store, memo: store
    words = list(map(str, train_arguments("data", Path("save"))))[1:]
    logging.disable()
    with warnings.catch_warnings(action="ignore"):
        arguments = options.parse_args_and_arch(options.get_training_parser(), words)
        convert_namespace_to_omegaconf(arguments)
    logging.disable(logging.NOTSET)


def run_forked(
    words: Sequence[Any], close_fds: bool = True, **streams: Any
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run``, with ``python -m ...`` in a fork of this process, which has all its files."""
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    if words[:2] == [sys.executable, "-m"] and streams in ({}, merged):
        done = completed(*words[2:], cwd=Path.cwd(), one_stream=True)
        if not streams:
            print(done.stdout, end="")
        return done
    return run_program(words, close_fds=close_fds, **streams)


run_program: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run


def run_module(
    words: list[str], cwd: Path, output: IO[str], errors: IO[str], fresh: bool
) -> NoReturn:
    """In a forked child: become ``python -m words``, or the script that they begin with, with its streams
    to ``output`` and ``errors``."""
    status = 1
    gc.freeze()  # what pytest has loaded is no garbage, and to look at it would copy it
    try:
        os.chdir(cwd)
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        if fresh:
            module = [] if words[0].endswith(".py") else ["-m"]
            os.execve(PYTHON, [PYTHON, *module, *words], {**os.environ, **ENVIRONMENT})
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        for handler in list(logging.root.handlers):  # pytest's; a command sets up its own
            logging.root.removeHandler(handler)
        logging.getLogger("fairseq").setLevel(logging.NOTSET)  # as a fresh interpreter has it
        warnings.simplefilter("ignore")  # as in ENVIRONMENT
        subprocess.run = run_forked  # type: ignore[assignment] (a command's own commands)
        sys.argv = words
        try:
            if words[0].endswith(".py"):
                runpy.run_path(words[0], run_name="__main__")
            else:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def error_line(output: str) -> str:
    """The one error line of a failed command; there must be no traceback."""
    assert "Traceback" not in output, output[-3000:]
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output[-3000:]
    return lines[0]


def sentence_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    generator = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = generator.choices(list(WORDS), k=generator.randint(1, 9))
        pairs.append((" ".join(words), " ".join(WORDS[word] for word in reversed(words))))
    return pairs


def write_text(folder: Path, split: str, pairs: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for language, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
        (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines))


def binarise(text: Path, destination: Path, dictionary: Path | None = None) -> Path:
    arguments = ["fairseq_cli.preprocess", "-s", "en", "-t", "de", "--destdir", destination]
    for split in ("train", "valid", "test"):
        if (text / f"{split}.en").exists():
            arguments += [f"--{split}pref", text / split]
    if dictionary is None:
        arguments += ["--joined-dictionary"]
    else:
        arguments += ["--srcdict", dictionary / "dict.en.txt", "--joined-dictionary"]
    command(*arguments)
    return destination


def train_arguments(data: object, save: Path, *options: object) -> list[object]:
    """Arguments of a tiny training; later options override."""
    return [
        "fairseq_cli.train", data, "--user-dir", ROOT / "sekd_fairseq",
        "--task", "self_evolution_kd", "--arch", "transformer_tiny", "--share-all-embeddings",
        "--optimizer", "adam", "--lr", "5e-3", "--dropout", "0", "--max-tokens", "300",
        "--max-update", "12", "--save-dir", save, "--no-epoch-checkpoints", "--cpu",
        "--log-format", "json", "--log-interval", "1", *options,
    ]  # fmt: skip


def train(data: object, save: Path, *options: object, check: bool = True) -> str:
    return command(*train_arguments(data, save, *options), check=check)


def spread_over_two() -> list[object]:
    """Options of a training's two processes on this machine, over gloo, but for each one's rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--distributed-world-size",
        2, "--distributed-init-method", f"tcp://127.0.0.1:{port}", "--distributed-no-spawn",
    ]  # fmt: skip


def train_in_two_processes(
    arguments: list[object], output: Path = Path(os.devnull), check: bool = True
) -> None:
    """Run a training in two processes on this machine, over gloo; ``output`` is the first's."""
    spread = spread_over_two()
    children = [
        start_command(
            *arguments, *spread, "--distributed-rank", rank, "--device-id", rank,
            output=Path(os.devnull) if rank else output,
        )
        for rank in range(2)
    ]  # fmt: skip
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 for child in children]
    assert ends == [check, check]


def parameters(checkpoint: Path) -> torch.Tensor:
    """All parameters of a checkpoint as one vector."""
    state = torch.load(checkpoint, map_location="cpu")["model"]
    return torch.cat([value.flatten().double() for value in state.values()])


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` fills, in one process of pytest-xdist for all of them."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name, numbered=False)
        make(folder)
        return folder
    folder = factory.getbasetemp().parent / name
    with FileLock(f"{folder}.lock"):
        if not (folder / ".made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a failed attempt left
            folder.mkdir()
            make(folder)
            (folder / ".made").touch()
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        for seed, (split, count) in enumerate({"train": 203, "valid": 21, "test": 13}.items()):
            write_text(folder, split, sentence_pairs(count, seed))

    return made_once(tmp_path_factory, "text", make)


@pytest.fixture(scope="session")
def data(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return (
        made_once(tmp_path_factory, "data", lambda folder: binarise(text, folder / "bin")) / "bin"
    )


@pytest.fixture(scope="session")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        train(
            data, folder, "--criterion", "cross_entropy", "--max-update", "60", "--seed", "7",
            "--disable-validation", "--task", "translation",
        )  # fmt: skip

    return made_once(tmp_path_factory, "teacher", make) / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def cache(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        command(
            "sekd_fairseq.build_cache", data, "--path", teacher, "--output", folder / "cache", "--cpu",
            "--subset", "train,valid,test", "--top-k", "6", "--shard-sentences", "50",
        )  # fmt: skip

    return made_once(tmp_path_factory, "cache", make) / "cache"


@pytest.fixture
def cache_copy(cache: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that a test may damage."""
    yield Path(shutil.copytree(cache, tmp_path / "cache"))


@pytest.fixture(scope="session")
def student(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A trained SE-KD student and the log of its training."""

    def make(folder: Path) -> None:
        options = ("--criterion", "self_evolution_kd", "--teacher-cache", cache)
        (folder / "log.txt").write_text(train(data, folder, *options, "--max-update", "40"))

    folder = made_once(tmp_path_factory, "student", make)
    return folder, (folder / "log.txt").read_text()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a bucket of moto's S3 server."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(f"bucket{port}")  # moto remembers those of other servers
    yield f"s3://bucket{port}"
    server.stop()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with byte pieces."""

    def make(folder: Path) -> None:
        lines = [word for pair in sentence_pairs(200, 9) for word in pair]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / "spm"), vocab_size=330,
            byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip

    return made_once(tmp_path_factory, "tokenizer", make) / "spm.model"


@pytest.fixture(scope="session")
def llm_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        write_text(folder, "train", sentence_pairs(60, 0))
        write_text(folder, "valid", sentence_pairs(9, 1))
        odd = [
            ("one", "你好，世界"),
            ("two", "Straße — „ja“"),
            ("a", "🙂  zwei   Lücken"),
            ("and", "ﬁ é"),
        ]
        write_text(folder, "test", odd + sentence_pairs(5, 2))

    return made_once(tmp_path_factory, "llm_text", make)


def prepare(tokenizer: Path, text: Path, output: Path, *options: object, check: bool = True) -> str:
    """Prepare text for language models."""
    splits = [word for s in ("train", "valid", "test") for word in (f"--{s}", text / s)]
    return command(
        "sekd_fairseq.prepare_llm_data", "--tokenizer", tokenizer, *splits, "--source-lang", "en",
        "--target-lang", "de", "--output", output, *options, check=check,
    )  # fmt: skip


@pytest.fixture(scope="session")
def llm_data(tokenizer: Path, llm_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        out = prepare(tokenizer, llm_text, folder / "data")
        assert '"unknown_tokens": 0' in out and '"translations_not_given_back_exactly": 0' in out

    return made_once(tmp_path_factory, "llm_data", make) / "data" / "bin"
