"""Whether the commands of a study know their options: each is read by its own parsers, and nothing is run.

    python scripts/pipeline/check.py < COMMANDS.json

COMMANDS.json has for each part of a configuration a module and its arguments. What is wrong is printed, a
line for each mistake that begins with the parts it is in, and the status is 1. Of a training also the model
is built, without memory, and its criterion, optimizer and schedule, which refuse what they cannot do. Data,
caches and checkpoints need not be there.
"""

import argparse
import difflib
import importlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from fairseq import optim, options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim.lr_scheduler import build_lr_scheduler

import sekd_fairseq.plugin  # noqa: F401 (registers task, criterions, models)
from analysis.runs.errors import UserError, one_line
from sekd_fairseq import build_cache, distilled_data, rounds
from sekd_fairseq.llm import loading
from sekd_fairseq.options import GROUPS
from sekd_fairseq.patches import check_validation
from sekd_fairseq.tasks.configuration import check_options
from sekd_fairseq.tasks.self_evolution_kd import SelfEvolutionKDTask


def main() -> None:
    logging.disable()
    warnings.simplefilter("ignore")  # fairseq calls hydra in ways that hydra has left behind
    found = mistakes(json.load(sys.stdin))
    for message, parts in found.items():
        print(f"{', '.join(parts)}: {message}")
    sys.exit(1 if found else 0)


def mistakes(commands: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What is wrong, and in which parts of the configuration."""
    found: dict[str, list[str]] = {}
    for part, (module, *words) in commands.items():
        try:
            READERS.get(module, read_own)(module, words)
        except SystemExit as error:  # of the plugin's doors
            found.setdefault(str(error.code).removeprefix("error: "), []).append(part)
        except UserError as error:
            found.setdefault(one_line(error), []).append(part)
        except Exception as error:  # fairseq's own refusals are of many types
            found.setdefault(f"{type(error).__name__}: {one_line(error)}", []).append(part)
    return found


def read_training(_: str, words: Sequence[str]) -> None:
    """Read a command line of fairseq-train, and make what can be made of it without data."""
    cfg = read_fairseq(options.get_training_parser(), words)
    check_validation(cfg)
    check_options(cfg.task)
    symbols = Dictionary()
    task = SelfEvolutionKDTask(cfg.task, symbols, symbols)
    if cfg.model._name == "hf_causal_lm":  # is built of files
        loading.check_options(cfg.model)
        if cfg.model.hf_config:
            loading.read_config(Path(cfg.model.hf_config))
    else:
        with torch.device("meta"):
            task.build_model(cfg.model)
    task.build_criterion(cfg.criterion)
    weights = [torch.nn.Parameter(torch.zeros(1))]
    build_lr_scheduler(cfg.lr_scheduler, optim.build_optimizer(cfg.optimizer, weights))


def read_generation(_: str, words: Sequence[str]) -> None:
    """Read a command line of fairseq-generate."""
    generation = read_fairseq(options.get_generation_parser(), words).generation
    if generation.sampling and generation.nbest != generation.beam:
        raise UserError(
            f"--sampling: fairseq expects as many --nbest as --beam, found {generation.nbest} and {generation.beam}"
        )


def read_rounds(_: str, words: Sequence[str]) -> None:
    """Read a command line of rounds, and that of a round's training."""
    settings = rounds.Settings.of(words)
    place = settings.run
    read_training("", rounds.training_words(settings, 1, settings.data, place, place, place))


def read_own(module: str, words: Sequence[str]) -> None:
    """Read a command line of one of the project's own commands."""
    parser = importlib.import_module(module).parser()
    parser.error = refusing(parser)
    args = parser.parse_args(words)
    if module == build_cache.__name__:
        build_cache.build_of(args)
    elif module == distilled_data.__name__:
        distilled_data.check_options(args)


READERS: dict[str, Callable[[str, Sequence[str]], None]] = {
    "fairseq_cli.train": read_training,
    "fairseq_cli.generate": read_generation,
    rounds.__name__: read_rounds,
}


def read_fairseq(parser: argparse.ArgumentParser, words: Sequence[str]) -> Any:
    """fairseq's configuration of a command line."""
    parser.error = refusing(parser)  # type: ignore[method-assign]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, list(words)))


def refusing(parser: argparse.ArgumentParser) -> Callable[[str], NoReturn]:
    """In place of ``parser.error``, which shows all options and ends the program."""

    def refuse(message: str) -> NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        if unknown:
            names = [word for word in unknown.split() if word.startswith("--")] or [unknown]
            raise UserError("; ".join(unknown_option(name, parser) for name in names))
        told, _, choices = message.partition(" (choose from ")
        wrong = told.partition("invalid choice: ")[2].strip("'")
        raise UserError(told + meant(wrong, re.findall(r"[\w.-]+", choices)))

    return refuse


def unknown_option(name: str, parser: argparse.ArgumentParser) -> str:
    """What to say of an option that a command does not have."""
    field = name.removeprefix("--").replace("-", "_")
    owners = [group for group, cfg in GROUPS.items() if field in {own.name for own in fields(cfg)}]
    if owners:
        return f"{name}: expected with {' or '.join(owners)} alone; leave it out, or take that"
    return f"{name}: no such option here{meant(name, parser._option_string_actions)}"


def meant(word: str, known: Iterable[str]) -> str:
    """What a mistyped word may have been meant to be."""
    near = difflib.get_close_matches(word, list(known))
    return f"; did you mean {' or '.join(near)}?" if near else ""


if __name__ == "__main__":
    main()
