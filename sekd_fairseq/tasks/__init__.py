"""fairseq imports this folder for ``--user-dir``; it registers everything that the plugin adds."""

from sekd_fairseq import criterions, patches  # noqa: F401
from sekd_fairseq.tasks import self_evolution_kd  # noqa: F401

patches.apply_all()
