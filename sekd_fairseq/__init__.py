"""Self-evolution knowledge distillation for machine translation, as a plugin of fairseq.

``fairseq-train --user-dir sekd_fairseq`` imports this package, which registers the task and the
criterion ``self_evolution_kd``.  :mod:`sekd_fairseq.losses` and :mod:`sekd_fairseq.teacher_cache`
work without fairseq.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("fairseq") is not None:
    from sekd_fairseq.compat import allow_checkpoint_types

    allow_checkpoint_types()

    from sekd_fairseq import criterions as criterions
    from sekd_fairseq.tasks import self_evolution_kd as self_evolution_kd
