"""Who holds what of a vocabulary that is split over ranks: a process group and plain tensors, or DTensors."""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref._checks import describe
from fastpref._function import has_values

SAMPLES = 4096
# Groups whose ranks were once seen to give the same: whether of logits' labels (True), or of hidden states (False).
_replicated: weakref.WeakKeyDictionary[Any, set[bool]] = weakref.WeakKeyDictionary()


class Shard(NamedTuple):
    """This rank's part of a vocabulary.

    Attributes:
        group: the ranks that hold the parts, in order.
        bounds: int64 (2,) on the operands' device: the first column here, and the number of all columns.
        largest: the most columns of a rank; a tensor where only the ranks together know it.
    """

    group: Any
    bounds: Tensor
    largest: Tensor | int


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor, without importing what DTensors are where nobody else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(value: Any) -> Any:
    """All of a DTensor, on every rank; anything else as it is."""
    return value.full_tensor() if is_dtensor(value) else value


def resolve_group(process_group: Any) -> Any:
    """The process group that a group or a one-dimensional device mesh stands for.

    Raises:
        TypeError: neither.
        ValueError: a mesh of more dimensions, or this rank is not of the group.
    """
    group = process_group
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if not hasattr(group, "get_group") or not hasattr(group, "ndim"):
            raise TypeError(
                f"process_group must be a ProcessGroup or a one-dimensional DeviceMesh; got {describe(group)}"
            )
        if group.ndim != 1:
            raise ValueError(
                f"process_group must be one group of ranks; got a mesh of {group.ndim} dimensions, "
                f'{group.mesh_dim_names}: pass the one that the vocabulary is split over, such as mesh["tp"]'
            )
        group = group.get_group()
    if dist.get_rank(group) < 0:
        raise ValueError("this rank is not of process_group: only those that hold a part of the vocabulary may call")
    return group


def _of_group(columns: int, device: torch.device, process_group: Any) -> Shard:
    group = resolve_group(process_group)
    own = torch.full((1,), columns, dtype=torch.int64, device=device)  # filled there, not copied: a copy waits
    sizes = own.new_empty(dist.get_world_size(group))
    # Its name from torch 2.13 on, and before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(sizes, own, group=group)
    return Shard(group, torch.stack([sizes[: dist.get_rank(group)].sum(), sizes.sum()]), sizes.max())


def _of_dtensor(name: str, value: Any, axis: int, device: torch.device) -> tuple[Shard, int] | tuple[None, None]:
    """The shard that a DTensor's placements are, and over which dimension of its mesh; None where it is whole."""
    mesh, placements = value.device_mesh, value.placements
    if mesh.get_coordinate() is None:
        raise ValueError(f"this rank is not of {name}'s mesh, {mesh}: only the ranks of the mesh may call")
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return None, None
    module = sys.modules["torch.distributed.tensor"]
    if len(split) > 1 or type(placements[split[0]]) is not module.Shard or placements[split[0]].dim != axis:
        raise ValueError(
            f"{name} must be split over one dimension of its mesh, by the vocabulary: placements that are "
            f"Shard({axis}) once and Replicate() else; got {placements} on {mesh}. Redistribute it, or, if a "
            "data-parallel wrapper has sharded it, score inside the wrapped module's forward, where it is whole "
            "(fastpref.attach)"
        )
    dim = split[0]
    ranks, vocabulary = mesh.size(dim), value.shape[axis]
    largest = (vocabulary + ranks - 1) // ranks
    first = min(mesh.get_local_rank(dim) * largest, vocabulary)
    bounds = torch.stack([torch.full((), n, dtype=torch.int64, device=device) for n in (first, vocabulary)])
    return Shard(mesh.get_group(dim), bounds, largest), dim


def _gathered(name: str, value: Any, mesh: Any, dim: int | None) -> Any:
    """What of a DTensor lies here once it is the same on all ranks of a mesh's dimension; other values as they are."""
    if not is_dtensor(value):
        return value
    if value.device_mesh != mesh:
        raise ValueError(f"{name} must be on the head's mesh, {mesh}; got a DTensor on {value.device_mesh}")
    placements = list(value.placements)
    if dim is not None:
        placements[dim] = sys.modules["torch.distributed.tensor"].Replicate()
    if not all(placement.is_replicate() for placement in placements):
        raise ValueError(
            f"{name} must be the same over all dimensions of the mesh but the vocabulary's; got {value.placements} on "
            f"{mesh}: where a dimension shares out the batch, distribute the head over the other one alone"
        )
    return value.redistribute(placements=placements).to_local(grad_placements=placements)


def _check_shared(name: str, value: Any, mesh: Any, dim: int | None, of: str) -> None:
    """A plain tensor beside a DTensor on a mesh: the same on all its ranks, as far as the mesh is the vocabulary's."""
    if not is_dtensor(value) and mesh.size() > (1 if dim is None else mesh.size(dim)):
        raise ValueError(
            f"{name} is a plain tensor, and {of} on {mesh}: whether its ranks share the rows, or have rows of their "
            f'own, is not said. Have {of} on one dimension, such as mesh["tp"], or make {name} a DTensor'
        )


def _samples(values: Tensor) -> Tensor:
    """As many values of a tensor as of any other, float64, from all over it."""
    flat = values.detach().flatten()
    if not len(flat):
        return flat.new_zeros(SAMPLES, dtype=torch.float64)
    at = torch.arange(SAMPLES, device=flat.device) * len(flat) // SAMPLES
    return torch.nan_to_num(flat[at].double(), nan=-1e30)


def _check_replicated(shard: Shard, hidden: Tensor | None, labels: Tensor) -> None:
    """Once for each group: every rank must give the same rows, or the sums of different ones are mixed."""
    if not has_values(labels):
        return
    kinds = _replicated.setdefault(shard.group, set())
    if (hidden is None) in kinds:
        return
    states = _samples(labels if hidden is None else hidden)
    # Labels are compared as a sum that their order enters, and never differ by rounding.
    order = torch.arange(labels.numel(), device=labels.device) * 40503 + 1
    exact = torch.stack([(labels.flatten() * order).sum() % (1 << 31), order.new_tensor(labels.numel())]).double()
    values = torch.cat([exact, states])
    extremes = torch.cat([values, -values])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=shard.group)
    highest, lowest = extremes.chunk(2)
    apart = highest + lowest
    # Rounding is a share of each value; other rows, or another dropout, differ by a share of all.
    if (apart[:2] > 0).any() or apart[2:].mean() > 0.05 * torch.maximum(highest, lowest)[2:].mean():
        raise ValueError(
            "every rank of the vocabulary's group must give the same rows, and labels, and these differ from rank to "
            "rank. Where each rank has a batch of its own, as under FSDP2, whose weights are DTensors too, score "
            "inside the wrapped module's forward, where the weight is whole (fastpref.attach); where each has a part "
            "of the sequence, gather the sequence first"
        )
    kinds.add(hidden is None)


def resolve_head(
    hidden: Any, weight: Any, bias: Any, labels: Any, process_group: Any
) -> tuple[Any, Any, Any, Any, Shard | None]:
    """Plain tensors for what may be DTensors, and which part of the vocabulary the weight here is, None for all.

    A hidden state that is split over the vocabulary's ranks is gathered; its gradient is taken apart again.

    Raises:
        TypeError: `process_group` is none.
        ValueError: placements that are not a split of the vocabulary; ranks whose hidden states differ.
    """
    if not is_dtensor(weight):
        for name, value in {"hidden": hidden, "bias": bias, "labels": labels}.items():
            if is_dtensor(value):
                raise ValueError(
                    f"{name} is a DTensor and weight is not: distribute the weight over {value.device_mesh}, or pass "
                    f"{name}.to_local()"
                )
        if process_group is None or not isinstance(weight, Tensor) or not isinstance(hidden, Tensor):
            return hidden, weight, bias, labels, None
        shard = _of_group(weight.shape[0], weight.device, process_group)
    else:
        if process_group is not None:
            raise ValueError("weight is a DTensor, whose mesh says which ranks share the vocabulary: no process_group")
        shard, dim = _of_dtensor("weight", weight, 0, weight.device)
        mesh = weight.device_mesh
        if is_dtensor(bias):
            if bias.device_mesh != mesh or bias.placements != weight.placements:
                raise ValueError(
                    f"bias must be placed as weight is, {weight.placements} on {mesh}; got {bias.placements} on "
                    f"{bias.device_mesh}"
                )
            bias = bias.to_local()
        elif bias is not None and shard is not None:
            raise ValueError(f"bias must be a DTensor placed as weight is, {weight.placements}; got {describe(bias)}")
        _check_shared("hidden", hidden, mesh, dim, "the head")
        hidden, labels = _gathered("hidden", hidden, mesh, dim), _gathered("labels", labels, mesh, dim)
        weight = weight.to_local()
    if shard is not None:
        _check_replicated(shard, hidden, labels)
    return hidden, weight, bias, labels, shard


def resolve_logits(
    logits: Any, labels: Any, process_group: Any, inplace: bool = False
) -> tuple[Any, Any, Shard | None]:
    """`resolve_head` for logits (..., V) split by their last dimension."""
    if not is_dtensor(logits):
        if is_dtensor(labels):
            raise ValueError("labels are a DTensor and logits are not: pass labels.to_local()")
        if process_group is None or not isinstance(logits, Tensor):
            return logits, labels, None
        shard = _of_group(logits.shape[-1], logits.device, process_group)
    else:
        if process_group is not None:
            raise ValueError("logits are a DTensor, whose mesh says which ranks share the vocabulary: no process_group")
        if inplace:
            # A DTensor has a version counter of its own, which nothing that is written to its parts moves.
            raise ValueError(
                "inplace_backward=True writes over plain logits; got a DTensor, of which a later use would not be "
                "noticed: pass inplace_backward=False"
            )
        shard, dim = _of_dtensor("logits", logits, logits.dim() - 1, logits.device)
        _check_shared("labels", labels, logits.device_mesh, dim, "the logits")
        logits, labels = logits.to_local(), _gathered("labels", labels, logits.device_mesh, dim)
    if shard is not None:
        _check_replicated(shard, None, labels)
    return logits, labels, shard
