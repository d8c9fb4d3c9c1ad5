"""Show every option that the plugin adds to fairseq's commands.

    python -m sekd_fairseq.options

``fairseq-train --help`` shows none of them: fairseq answers before it looks at what is named.
"""

import argparse
from collections.abc import Sequence

from fairseq.dataclass.utils import gen_parser_from_dataclass

from sekd_fairseq.criterions.cached_kd import CachedKDConfig
from sekd_fairseq.criterions.self_evolution_kd import SelfEvolutionKDConfig
from sekd_fairseq.models.hf_causal_lm import HFCausalLMConfig
from sekd_fairseq.tasks.configuration import SelfEvolutionKDTaskConfig

GROUPS = {
    "--task self_evolution_kd": SelfEvolutionKDTaskConfig,
    "--criterion self_evolution_kd": SelfEvolutionKDConfig,
    "--criterion cached_kd": CachedKDConfig,
    "--arch hf_causal_lm": HFCausalLMConfig,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the options, a group for what each belongs to."""
    argparse.ArgumentParser(
        prog="python -m sekd_fairseq.options", description="Show the options of the plugin."
    ).parse_args(argv)
    for name, config in GROUPS.items():
        shown = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
        gen_parser_from_dataclass(shown.add_argument_group(name), config())
        print(shown.format_help().strip(), end="\n\n")


if __name__ == "__main__":
    main()
