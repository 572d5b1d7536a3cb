"""Find which part of a vocabulary each rank holds, from a process group and plain tensors, or from DTensors."""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref._core.autograd import has_values
from fastpref._core.checks import describe

SAMPLES = 4096
# The groups whose ranks have been checked to pass the same labels of logits (True), or the same hidden states (False).
_replicated: weakref.WeakKeyDictionary[Any, set[bool]] = weakref.WeakKeyDictionary()


class Shard(NamedTuple):
    """This rank's part of a vocabulary.

    Attributes:
        group: the ranks that hold the parts, in order.
        bounds: int64 (2,) on the operands' device: the first column here, and the number of all columns.
        largest: the most columns of any rank; a tensor if only the ranks together know it.
    """

    group: Any
    bounds: Tensor
    largest: Tensor | int


def is_dtensor(value: object) -> bool:
    """Return whether a value is a DTensor, without importing the module, because no DTensor exists before that."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(value: Any) -> Any:
    """Return the whole tensor of a DTensor, on every rank, and any other value as it is."""
    return value.full_tensor() if is_dtensor(value) else value


def resolve_group(process_group: Any) -> Any:
    """Return a process group as it is, or the group of a one-dimensional device mesh.

    Raises:
        TypeError: `process_group` is neither.
        ValueError: the mesh has more dimensions, or this rank is not in the group.
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
        raise ValueError("this rank is not in process_group: only ranks that hold a part of the vocabulary may call")
    return group


def _of_group(columns: int, device: torch.device, process_group: Any) -> Shard:
    group = resolve_group(process_group)
    own = torch.full((1,), columns, dtype=torch.int64, device=device)  # filled on the device: a copy would wait
    sizes = own.new_empty(dist.get_world_size(group))
    # The first name exists from torch 2.13 on, the second before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(sizes, own, group=group)
    return Shard(group, torch.stack([sizes[: dist.get_rank(group)].sum(), sizes.sum()]), sizes.max())


def _of_dtensor(name: str, value: Any, axis: int, device: torch.device) -> tuple[Shard, int] | tuple[None, None]:
    """Return this rank's shard of a DTensor, and the mesh dimension that splits it; None for each if it is whole."""
    mesh, placements = value.device_mesh, value.placements
    if mesh.get_coordinate() is None:
        raise ValueError(f"this rank is not in {name}'s mesh, {mesh}: only the ranks of the mesh may call")
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not split:
        return None, None
    module = sys.modules["torch.distributed.tensor"]
    if len(split) > 1 or type(placements[split[0]]) is not module.Shard or placements[split[0]].dim != axis:
        raise ValueError(
            f"{name} must be split over one dimension of its mesh, by the vocabulary: one placement "
            f"Shard({axis}) and the others Replicate(); got {placements} on {mesh}. Redistribute it, or, if a "
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
    """Return a DTensor's local tensor after replicating it over a mesh dimension, and any other value as it is."""
    if not is_dtensor(value):
        return value
    if value.device_mesh != mesh:
        raise ValueError(f"{name} must be on the head's mesh, {mesh}; got a DTensor on {value.device_mesh}")
    placements = list(value.placements)
    if dim is not None:
        placements[dim] = sys.modules["torch.distributed.tensor"].Replicate()
    if not all(placement.is_replicate() for placement in placements):
        raise ValueError(
            f"{name} must be replicated over all dimensions of the mesh but the vocabulary's; got {value.placements} "
            f"on {mesh}: if a dimension splits the batch, distribute the head over the other dimension only"
        )
    return value.redistribute(placements=placements).to_local(grad_placements=placements)


def _check_shared(name: str, value: Any, mesh: Any, dim: int | None, of: str) -> None:
    """Raise `ValueError` for a plain tensor beside a DTensor if its mesh has ranks besides the vocabulary's group."""
    if not is_dtensor(value) and mesh.size() > (1 if dim is None else mesh.size(dim)):
        raise ValueError(
            f"{name} is a plain tensor, and {of} on {mesh}: it is unclear whether the ranks share the rows or have "
            f'rows of their own. Put {of} on one dimension, such as mesh["tp"], or make {name} a DTensor'
        )


def _samples(values: Tensor) -> Tensor:
    """Return `SAMPLES` values, evenly spaced over a tensor of any size, in float64."""
    flat = values.detach().flatten()
    if not len(flat):
        return flat.new_zeros(SAMPLES, dtype=torch.float64)
    at = torch.arange(SAMPLES, device=flat.device) * len(flat) // SAMPLES
    return torch.nan_to_num(flat[at].double(), nan=-1e30)


def _check_replicated(shard: Shard, hidden: Tensor | None, labels: Tensor) -> None:
    """Raise `ValueError` if the ranks of a group pass different rows. Each group is checked once."""
    if not has_values(labels):
        return
    kinds = _replicated.setdefault(shard.group, set())
    if (hidden is None) in kinds:
        return
    states = _samples(labels if hidden is None else hidden)
    # Labels are compared by a sum that depends on their order and has no rounding error.
    order = torch.arange(labels.numel(), device=labels.device) * 40503 + 1
    exact = torch.stack([(labels.flatten() * order).sum() % (1 << 31), order.new_tensor(labels.numel())]).double()
    values = torch.cat([exact, states])
    extremes = torch.cat([values, -values])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=shard.group)
    highest, lowest = extremes.chunk(2)
    apart = highest + lowest
    # Rounding changes each value by a small share; other rows, or another dropout, change all values by a large one.
    if (apart[:2] > 0).any() or apart[2:].mean() > 0.05 * torch.maximum(highest, lowest)[2:].mean():
        raise ValueError(
            "every rank of the vocabulary's group must pass the same rows and labels, and these differ from rank to "
            "rank. Where each rank has a batch of its own, as under FSDP2, whose weights are DTensors too, score "
            "inside the wrapped module's forward, where the weight is whole (fastpref.attach); where each has a part "
            "of the sequence, gather the sequence first"
        )
    kinds.add(hidden is None)


def local_head(
    hidden: Any, weight: Any, bias: Any, labels: Any, process_group: Any
) -> tuple[Any, Any, Any, Any, Shard | None]:
    """Return plain tensors for tensors that may be DTensors, and this rank's shard of the vocabulary, or None.

    Hidden states that are split over the vocabulary's ranks are gathered, and their gradient is split again.

    Raises:
        TypeError: `process_group` is neither a group nor a mesh.
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


def local_logits(logits: Any, labels: Any, process_group: Any, inplace: bool = False) -> tuple[Any, Any, Shard | None]:
    """Return plain logits (..., V) and labels, and this rank's shard of the vocabulary, as `local_head` does."""
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
            # A DTensor has a version counter of its own, and writing to its local tensor does not advance it.
            raise ValueError(
                "inplace_backward=True writes over plain logits; got a DTensor, whose later use would not raise "
                "an error: pass inplace_backward=False"
            )
        shard, dim = _of_dtensor("logits", logits, logits.dim() - 1, logits.device)
        _check_shared("labels", labels, logits.device_mesh, dim, "the logits")
        logits, labels = logits.to_local(), _gathered("labels", labels, logits.device_mesh, dim)
    if shard is not None:
        _check_replicated(shard, None, labels)
    return logits, labels, shard
