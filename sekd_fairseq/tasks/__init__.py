"""fairseq imports this folder for ``--user-dir``; it registers everything that the plugin adds."""

from sekd_fairseq import compat, criterions  # noqa: F401
from sekd_fairseq.llm import bpe  # noqa: F401
from sekd_fairseq.tasks import self_evolution_kd  # noqa: F401

compat.allow_checkpoint_types()
compat.keep_checkpoints_whole()
compat.resume_as_left()
compat.train_in_half_precision()
