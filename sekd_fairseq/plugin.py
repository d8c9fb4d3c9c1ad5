"""The plugin in this project's own commands: importing this registers it, as ``--user-dir`` does in fairseq's."""

import logging

import sekd_fairseq.tasks  # noqa: F401 (registers task, criterions, models; lets torch load checkpoints)


def quiet_fairseq() -> None:
    """Silence fairseq's reports on every dictionary and dataset that it loads.

    For a command's ``main``, which prints what matters itself.
    """
    for name in ("fairseq", "hydra"):
        logging.getLogger(name).setLevel(logging.WARNING)
