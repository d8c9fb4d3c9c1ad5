"""Self-evolution knowledge distillation for machine translation, as a plugin of fairseq.

``fairseq-train --user-dir sekd_fairseq`` imports :mod:`sekd_fairseq.tasks`, which registers the
task and the criterion ``self_evolution_kd``.  :mod:`sekd_fairseq.losses` (torch) and
:mod:`sekd_fairseq.teacher_cache` (pyarrow) work without fairseq, so nothing is imported here.
"""

__version__ = "0.1.0"
