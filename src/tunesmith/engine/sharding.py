"""A base too large to be held whole in training: its blocks' parameters spread over the processes (FSDP2).

torch's `fully_shard` gathers a block's parameters when it is called and lets them go after; gradients are summed to where
each piece lives. What lies outside of the blocks (embedding, last norm, head, vectors of new words) stays whole on every
process: the head is multiplied with outside of its module's forward, where no hook could gather it. Gradients of these are
summed like those of unsharded training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.sites import blocks
from tunesmith.core.errors import RunError
from tunesmith.engine.model import Model
from tunesmith.engine.processes import Processes


def shard(model: Model, processes: Processes) -> None:
    """Spread the blocks' parameters. Raises RunError where that cannot be done.

    Shards are pieces along the first dimension in the order of ranks. Parameters are replaced: whoever holds on to one
    asks for it again, as the adapter does here.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    net: Any = model.base.model
    _check(model)
    assert processes.device is not None
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    _, layers = blocks(net)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = {parameter for parameter in net.parameters() if id(parameter) not in inside}
    fully_shard(net.base_model, mesh=mesh, ignored_params=outside)
    for layer in layers:
        sharded: Any = layer  # gradients are summed: the step's denominator counts every process's tokens
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    _ask_again(model)


def gather(model: Model) -> None:
    """Make the model whole on every process again; from here on each may use it without the others."""
    _, layers = blocks(model.base.model)
    for layer in layers:
        sharded: Any = layer
        sharded.reshard()
        sharded.set_reshard_after_forward(False)
        sharded.unshard()
    _ask_again(model)


@contextmanager
def whole(model: Model) -> Iterator[None]:
    """The model whole for a while, for work that the processes do not do in step: answering, each its own questions."""
    gather(model)
    yield
    _, layers = blocks(model.base.model)
    for layer in layers:
        sharded: Any = layer
        sharded.set_reshard_after_forward(True)
        sharded.reshard()
    _ask_again(model)


def piece(value: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is spread."""
    spread: Any = value
    return spread.to_local() if is_spread(value) else value


def piece_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor that is spread like another; the whole where that is not spread."""
    spread: Any = like
    if not is_spread(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), spread.device_mesh, spread.placements, src_data_rank=None).to_local()


def is_spread(value: Tensor) -> bool:
    """Whether each process holds only a piece of a tensor."""
    return hasattr(value, "placements")


def _ask_again(model: Model) -> None:
    adapter = model.adapter
    adapter.trained = {path: model.base.model.get_parameter(path) for path in adapter.trained}


def _check(model: Model) -> None:
    net = model.base.model
    attached = net.__dict__.get("ts_attached", [])
    if others := [adapter for adapter in attached if adapter not in model.adapters]:
        raise RunError(
            f"'{others[0].expression}' of another model is attached to this base, which can then not be spread.",
            hints=["Detach that model first, or load the base again."],
        )
    if model.adapter.penalty() is not None:
        raise RunError(
            f"'{model.adapter.expression}' adds to the loss what needs whole matrices, and these would be spread.",
            hints=["Nearest that works here:  train.sharding=none"],
        )
    if any(form.writes for form in model.adapter.forms.values()):
        raise RunError(
            f"'{model.adapter.expression}' writes into weights of the base, which would be spread.",
            hints=["Nearest that works here:  train.sharding=none"],
        )
    if any(not parameter.is_floating_point() for layer in blocks(net)[1] for parameter in layer.parameters()):
        raise RunError(
            "the base is kept in 4 bits, and its codes cannot be spread.",
            hints=["Nearest that works here:  train.sharding=none", "Or leave out base.quantise"],
        )
    for layer in blocks(net)[1]:
        dtypes = _dtypes(parameter for parameter in layer.parameters() if parameter.requires_grad)
        if len(dtypes) > 1:
            raise RunError(
                f"the adapter trains {' and '.join(dtypes)} parameters in one block, whose gradients cannot be summed together.",
                hints=["Nearest that works here:  base.dtype=fp32", "Or train one kind alone, or train.sharding=none"],
            )


def _dtypes(parameters: Iterable[nn.Parameter]) -> list[str]:
    return sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
