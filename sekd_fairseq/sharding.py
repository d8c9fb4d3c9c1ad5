"""All weights of a student, their gradients and the optimiser's state, sharded over the processes.

``--shard-weights`` shards with torch's ``fully_shard`` (FSDP2): each process holds a part of every weight,
and a layer's are whole only while it runs.  fairseq's own way, ``--ddp-backend fully_sharded``, needs
fairscale, which is no longer maintained.

fairseq's optimisers get each process's part as an ordinary tensor (:meth:`ShardedModel.parameters`), so
that those that treat every number alone (Adam, SGD) work as they are, in ``--bf16`` with their copy in
single precision.  What is not so is done over all processes: the norm of the gradient, and what a
checkpoint holds, which is the same as of one process.
"""

import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from fairseq import models
from fairseq.trainer import Trainer
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sekd_fairseq.errors import UserError, one_line_errors

logger = logging.getLogger(__name__)


class ShardedModel(nn.Module):
    """A fairseq model whose weights are sharded; what it lacks itself is the model's.

    Parameters
    ----------
    model
        The same in every process. It is changed in place: each layer of a list of layers is sharded by
        itself, the rest as one.
    device
        Where the parts go.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for module in [*layers(model), model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self.module = model
        #: Each weight and this process's part of it, which shares its memory.
        self.parts = [
            (weight, nn.Parameter(weight.to_local().detach(), weight.requires_grad))
            for weight in model.parameters()
            if isinstance(weight, DTensor)
        ]
        #: What a checkpoint holds of the model, gathered by :meth:`gather` for the next one.
        self.gathered: dict[str, Any] = {}
        here, of_all = (sum(one[i].numel() for one in self.parts) for i in (1, 0))
        logger.info("weights are sharded: %d of %d are in this process", here, of_all)

    def __getattr__(self, name: str) -> Any:
        """The model's, where this has none."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.module(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """This process's part of each weight, for the optimiser."""
        return iter([part for _, part in self.parts])

    def all_reduce_grads(self) -> None:
        """Hand over the gradients, which are reduced already, to the parts."""
        for weight, part in self.parts:
            gradient: Any = weight.grad
            part.grad = None if gradient is None else gradient.to_local()
            weight.grad = None

    def _reshard(self) -> None:
        """Drop the whole weights that validation has left, so that the modules have their parts."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gather(self) -> None:
        """Gather the whole weights on the first process; all processes call it together."""
        self._reshard()
        self.gathered = {name: whole(value) for name, value in self.module.state_dict().items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What :meth:`gather` has found; of the first process, which writes checkpoints."""
        assert self.gathered, "gather() comes first"
        found, self.gathered = self.gathered, {}
        return found

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load whole weights; every process keeps its part of them."""
        self._reshard()
        known = self.module.state_dict()
        sharded = {name: like(value, known.get(name)) for name, value in state_dict.items()}
        return self.module.load_state_dict(sharded, *args, **kwargs)

    def gather_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimiser's state with whole tensors, on the first process; all call it together."""
        return self._state(state, lambda value, weight: whole(sharded_as(value, weight)))

    def scatter_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`gather_optimizer`, without communication."""
        return self._state(state, lambda value, weight: like(value, weight).to_local())

    def _state(self, state: dict[str, Any], change: Any) -> dict[str, Any]:
        """An optimiser's state, the tensors of a weight changed."""
        weights = [weight for weight, part in self.parts if part.requires_grad]
        changed = {
            number: {
                key: change(value, weights[number])
                if isinstance(value, Tensor) and value.dim()
                else value
                for key, value in of_weight.items()
            }
            for number, of_weight in state["state"].items()
        }
        return {**state, "state": changed}


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the outermost lists of modules, which run one after the other."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            found += [one for one in child if any(True for _ in one.parameters())]
        else:
            found += layers(child)
    return found


def sharded_as(part: Tensor, weight: DTensor) -> DTensor:
    """This process's part of a tensor that is sharded as a weight is."""
    return DTensor.from_local(
        part,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def like(value: Any, weight: Any) -> Any:
    """A whole tensor sharded as a weight is; anything else as it is."""
    if not isinstance(weight, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


def whole(value: Any) -> Any:
    """A sharded tensor as a whole one, on the CPU of the first process; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    gathered = value.full_tensor().detach()
    return gathered.cpu() if distributed.get_rank() == 0 else None


def check_sharding(trainer: Any) -> None:
    """Refuse what does not go with ``--shard-weights``."""
    cfg = trainer.cfg
    refused = {
        "--fp16": cfg.common.fp16,
        "--amp": cfg.common.amp,
        "--eval-bleu": cfg.task.eval_bleu,
        "--store-ema": cfg.ema.store_ema,
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--zero-sharding": cfg.distributed_training.zero_sharding != "none",
        f"--optimizer {cfg.optimizer._name}": not trainer._optimizer.supports_flat_params,
    }
    single = {weight.dtype for weight in trainer.model.module.parameters() if weight.requires_grad}
    refused["--bf16, of a model with weights in single precision,"] = len(single) > 1
    for option, given in refused.items():
        if given:
            raise UserError(
                f"--shard-weights: expected no {option} beside it, which looks at weights as a whole; "
                "half precision is --bf16, translations are judged with fairseq-generate"
            )


@functools.cache
def shard_weights() -> None:
    """Let fairseq's trainer train a model that the task has marked (``shard_weights``)."""
    wrap = models.DistributedFairseqModel

    @functools.wraps(wrap)
    def wrap_or_shard(args: Any, model: Any, process_group: Any, device: torch.device) -> Any:
        if getattr(model, "shard_weights", False):
            return ShardedModel(model, device)
        return wrap(args, model, process_group, device)

    models.DistributedFairseqModel = wrap_or_shard
    build, consolidate = Trainer._build_optimizer, Trainer.consolidate_optimizer
    load_checkpoint = Trainer.load_checkpoint
    clip = Trainer.clip_grad_norm

    @functools.wraps(build)
    def build_optimizer(self: Any) -> None:
        build(self)
        model = self.model
        if not isinstance(model, ShardedModel):
            return
        with one_line_errors():
            check_sharding(self)
        load = self._optimizer.load_state_dict

        def load_part(state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            load(model.scatter_optimizer(state), *args, **kwargs)

        self._optimizer.load_state_dict = load_part

    @functools.wraps(load_checkpoint)
    def load_parts(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, ShardedModel):
            # Every process maps the file and reads its parts; else the first sends all of it to all.
            self.cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        return load_checkpoint(self, *args, **kwargs)

    @functools.wraps(consolidate)
    def consolidate_optimizer(self: Any) -> None:
        if not isinstance(self.model, ShardedModel):
            consolidate(self)
            return
        if error := sys.exc_info()[1]:
            raise error  # one process cannot gather alone, so there is no crash.pt
        self.model.gather()
        self._gathered_optim_state = None
        if not self.cfg.checkpoint.no_save_optimizer_state:
            state = self.optimizer.state_dict()
            self._gathered_optim_state = self.model.gather_optimizer(state)

    @functools.wraps(clip)
    def clip_grad_norm(self: Any, clip_norm: float) -> Any:
        if not isinstance(self.model, ShardedModel):
            return clip(self, clip_norm)
        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=norm_of_all)

    Trainer._build_optimizer = build_optimizer
    Trainer.load_checkpoint = load_parts
    Trainer.consolidate_optimizer = consolidate_optimizer
    Trainer.clip_grad_norm = clip_grad_norm


def norm_of_all(norm: Tensor) -> Tensor:
    """The norm of what all processes hold parts of, from that of this one's."""
    squared = norm.double() ** 2
    distributed.all_reduce(squared)
    return squared.sqrt().float()
