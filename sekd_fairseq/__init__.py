"""Self-evolution knowledge distillation for machine translation, as a plugin of fairseq.

``fairseq-train --user-dir sekd_fairseq`` imports :mod:`sekd_fairseq.tasks`, which registers the
task and the criterion ``self_evolution_kd``.  :mod:`sekd_fairseq.losses` (torch) and
:mod:`sekd_fairseq.teacher_cache` (pyarrow) work without fairseq, so nothing is imported here.
"""

import logging

__version__ = "0.1.0"

# At every start fairseq notes that a package is missing which translation does not use.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
