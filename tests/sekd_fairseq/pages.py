"""The command blocks of the pages, and a way to run them as a reader does, in little time."""

import contextlib
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .conftest import ROOT, fork_module, read_settings_once

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Programs that a block may call, and the modules that they are.
PROGRAMS = {
    **{
        f"fairseq-{name}": f"fairseq_cli.{name}"
        for name in ("train", "generate", "interactive", "validate", "preprocess")
    },
    "snakemake": "snakemake",
    **{
        f"ct2-{name}-converter": f"ctranslate2.converters.{name}"
        for name in ("fairseq", "transformers")
    },
}
#: Those that are not fairseq's and take none of its options.
OTHERS = {name for name in PROGRAMS if not name.startswith("fairseq-")}
#: Sizes that replace a block's larger ones, so that a training takes seconds. The rest stays as written.
SMALL = {"--max-update": 60, "--warmup-updates": 10, "--max-tokens": 600, "--beam": 2, "--nbest": 2}
#: The learning rate with which as few updates teach something.
RATE = "0.01"
#: And the size of the Transformers.
TINY = [
    f"--{side}-{name}={size}"
    for side in ("encoder", "decoder")
    for name, size in (
        ("layers", 1),
        ("embed-dim", 32),
        ("ffn-embed-dim", 32),
        ("attention-heads", 2),
    )
]
#: What stands in a block for a program: it hands its words and streams to the process of the test,
#: whose forks have imported fairseq already.
CLIENT = f"""#!{sys.executable} -IS
import json, os, socket, sys
if os.path.basename(sys.argv[0]) == "python" and sys.argv[1] != "-m" and not sys.argv[1].endswith(".py"):
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["PAGES_SOCKET"])
    call = json.dumps([sys.argv, os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [b"+"], [0, 1, 2])
    server.sendall(call.encode() + b"\\n")
    sys.exit(int(server.recv(8) or 1))
"""


def blocks(page: Path, languages: Sequence[str] = ("", "bash")) -> list[str]:
    """The shell blocks of a page, or those of other languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in found if language in languages]


def block_with(page: str, words: str) -> str:
    """The block of a page that holds some words."""
    (found,) = [block for block in blocks(ROOT / page) if words in block]
    return found


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block that is one of ours, without what the shell does around it."""
    lines = text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for part in re.split(r"\s(?:\||&&)\s|>", line.strip()):
            with contextlib.suppress(ValueError):  # of no quotation is an end
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words.pop(0)  # the environment
                if words[:2] == ["python", "-m"] or (
                    words[:1] and words[0] in PROGRAMS and words[0] not in OTHERS
                ):
                    found.append(words)
    return found


def run_block(folder: Path, page: str, words: str, replaced: Mapping[str, str] = {}) -> str:
    """Run the block of a page that holds some words, with what a reader replaces in it; each must be
    there. Returns what it prints."""
    block = block_with(page, words)
    for before, after in replaced.items():
        assert before in block, (before, block)
        block = block.replace(before, after)
    return execute(folder, block)


def execute(folder: Path, block: str) -> str:
    """Run a block with bash as it is written; the first failure ends it. Returns what it prints.

    ``pip install`` is left out, sizes are those of :data:`SMALL` and :data:`TINY`, and fairseq's commands
    run on the CPU.
    """
    lines = [line for line in block.splitlines() if not line.startswith("pip install")]
    script = "set -euo pipefail\n" + "\n".join(lines)
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile("w+") as output:
        for name in ("python", *PROGRAMS):
            path = Path(place, name)
            path.write_text(CLIENT)
            path.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{place}/socket")
        listener.listen()
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([place, os.environ["PATH"]]),
            "PAGES_SOCKET": f"{place}/socket",
            "PYTHONPATH": str(ROOT),
        }
        bash = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=environment, stdout=output,
            stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
        read_settings_once()  # here, for all forks
        try:
            status = serve(listener, bash, time.monotonic() + 1500)
        finally:
            listener.close()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(bash.pid, signal.SIGKILL)
        output.seek(0)
        printed = output.read()
    assert status == 0, printed[-4000:]
    return printed


def serve(listener: socket.socket, bash: subprocess.Popen[bytes], end: float) -> int:
    """Run what the clients of a block ask for until it ends; returns its status."""
    handlers = set()
    while (status := bash.poll()) is None and time.monotonic() < end:
        if select.select([listener], [], [], 0.02)[0]:
            connection, _ = listener.accept()
            with connection:
                handler = os.fork()
                if handler == 0:
                    handle(connection)
                handlers.add(handler)
    for handler in handlers:
        if status is None:
            os.killpg(handler, signal.SIGKILL)
        os.waitpid(handler, 0)
    return 1 if status is None else status


def handle(connection: socket.socket) -> None:
    """In a child: run one program with the client's words, folder, environment and streams."""
    status = 1
    try:
        os.setpgid(0, 0)
        streams = socket.recv_fds(connection, 1, 3)[1]
        with connection.makefile() as lines:
            words, cwd, environment = json.loads(lines.readline())
        os.environ.clear()
        os.environ.update(environment)
        os.dup2(streams[0], 0)
        # What a program starts comes here too.
        sys.executable = str(Path(environment["PAGES_SOCKET"]).with_name("python"))
        output, errors = (os.fdopen(stream, "w") for stream in streams[1:])
        child = fork_module(small(words), Path(cwd), output, errors)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(status).encode())
    finally:
        os._exit(status)


def small(words: list[str]) -> list[str]:
    """The module of a program and its arguments, with the sizes of a test."""
    name = os.path.basename(words[0])
    if name not in PROGRAMS:  # python
        arguments = words[2 if words[1] == "-m" else 1 :]
    else:
        arguments = [PROGRAMS[name], *words[1:]]
        for place, word in enumerate(words[:-1]):
            if word in SMALL and int(words[place + 1]) > SMALL[word]:
                arguments[place + 1] = str(SMALL[word])
            elif word == "--lr":
                arguments[place + 1] = RATE
        if name == "fairseq-train" and "hf_causal_lm" not in words:
            arguments += TINY
        if name != "fairseq-preprocess" and name not in OTHERS:
            arguments.append("--cpu")
    for option in {"--user-dir", "--user_dir"} & set(
        arguments
    ):  # a fork has imported it from there
        arguments[arguments.index(option) + 1] = str(ROOT / "sekd_fairseq")
    return arguments
