"""fairseq imports this folder for ``--user-dir``; it registers everything that the plugin adds."""

import logging

# A note of fairseq's about a package that translation does not use, at every start.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)

from sekd_fairseq import compat, criterions  # noqa: E402, F401
from sekd_fairseq.tasks import self_evolution_kd  # noqa: E402, F401

compat.allow_checkpoint_types()
