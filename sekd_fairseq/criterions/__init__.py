"""The criterions: gather the inputs, call the loss, sum, log. Importing this registers them."""

from sekd_fairseq.criterions import cached_kd, self_evolution_kd  # noqa: F401
