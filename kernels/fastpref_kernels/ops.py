"""The schema, the fake and the dispatch of every operator of fastpref.

PyTorch's dispatcher picks the kernel: C++ for a CPU, Triton for CUDA, ROCm and XPU devices, and the chunked PyTorch of
`eager/` for all other devices. The operators know nothing of autograd: forward and backward are separate operators, and
the `torch.autograd.Function`s that pair them are in `fastpref`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels import contract, linear
from fastpref_kernels.cpu import linear as cpu_linear
from fastpref_kernels.cpu import logprobs as cpu
from fastpref_kernels.eager import gae
from fastpref_kernels.eager import logprobs as eager
from fastpref_kernels.triton import launches

NAMESPACE = "fastpref"
Rows = linear.Rows
TRITON_KEYS = ("CUDA", "XPU")
# Triton is not imported before the first launch.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# The operators that return a loss, its partial derivatives and other reported values, with the files of their kernels.
LOSSES = {
    "dpo_loss": "losses.preference",
    "kto_loss": "losses.preference",
    "pairwise_reward_loss": "losses.reward",
    "best_of_k_loss": "losses.reward",
    "ranking_loss": "losses.reward",
    "plackett_luce_loss": "losses.reward",
}

# The arguments that forward and backward share, in the order of `contract.Scoring`, after the tensors of each.
_LINEAR = "int ignore_index, bool shift, float logit_scale, float temperature, float? softcap"
_SCORING = f"{_LINEAR}, str reduction"
# One tensor for every statistic.
_STATISTICS = ", ".join(["Tensor"] * len(contract.STATISTICS))
_LINEAR_STATISTICS = ", ".join(["Tensor"] * len(contract.LINEAR_STATISTICS))

_SCHEMAS = (
    # logits (B, T, V), labels (B, T), cu_seqlens (S+1,) with B = 1, weights (B, T').  T' = T - 1 with shift, else T.
    # -> `contract.LogprobsResult`. Where a statistic but lse is asked for, the anchor in norm is u's maximum.
    f"logprobs(Tensor logits, Tensor labels, Tensor? cu_seqlens, Tensor? weights, {_SCORING}, int stats) -> "
    f"(Tensor, Tensor, Tensor, Tensor, {_STATISTICS})",
    # grad is (B, T') with reduction "none", else (S,); grad_entropy (B, T'). -> the gradient of logits, (B, T, V)
    "logprobs_backward(Tensor? grad, Tensor? grad_entropy, Tensor logits, Tensor labels, Tensor? cu_seqlens, "
    f"Tensor? weights, Tensor norm, Tensor counts, {_SCORING}) -> Tensor",
    "logprobs_backward_(Tensor? grad, Tensor? grad_entropy, Tensor(a!) logits, Tensor labels, Tensor? cu_seqlens, "
    f"Tensor? weights, Tensor norm, Tensor counts, {_SCORING}) -> ()",
    # hidden (B, T, H), weight (V, H), bias (V,), the rest as above. store: (rows, V) or None, with at least as many
    # rows as are scored, receives what the backward's products need, in a dtype of float32's range. rows: the number of
    # scored rows, or more, if all labels are in range; None: the host reads the number and checks the labels.
    # chunk_rows: the most rows of a tile. -> `contract.LinearResult`.
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens, Tensor(a!)? store, "
    f"{_LINEAR}, int stats, SymInt? rows, int? chunk_rows, float? filter_eps) -> "
    f"(Tensor, Tensor, Tensor, {_LINEAR_STATISTICS})",
    # The same in parts, for a weight whose rows are a shard of the vocabulary. shard: int64 (2,), its first column and
    # the number of all columns. shard_labels checks labels, and returns columns of the shard, or values outside of it.
    # With `checks`, a label in no shard raises an error; without, its row is NaN. linear_fold returns the sums of each
    # row (9, B, T') float64, `contract.RowSums`, and each tile's mass at the row's anchor. linear_finalize returns the
    # results of linear_logprobs, from those sums and the sums over all shards.
    "shard_labels(Tensor labels, Tensor? cu_seqlens, Tensor shard, int columns, int ignore_index, bool shift, "
    "bool checks) -> Tensor",
    "linear_fold(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens, Tensor(a!)? store, "
    f"{_LINEAR}, int stats, SymInt? rows, int? chunk_rows, float? filter_eps) -> (Tensor, Tensor)",
    "linear_finalize(Tensor hidden, Tensor labels, Tensor? cu_seqlens, Tensor shard, Tensor sums, Tensor whole_sums, "
    f"Tensor masses, Tensor(a!)? store, {_LINEAR}, int stats, SymInt? rows, "
    f"float? filter_eps) -> (Tensor, Tensor, Tensor, {_LINEAR_STATISTICS})",
    # grad and grad_entropy (B, T'). -> the gradients of hidden, weight and bias, in these dtypes; empty if not needed.
    # A label outside of the weight's rows belongs to another shard: the row has no label here. The dtypes are three
    # arguments and not a ScalarType[], whose elements reach Python as integers before torch 2.12.
    "linear_logprobs_backward(Tensor? grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor labels, Tensor? cu_seqlens, Tensor norm, Tensor? store, Tensor shares, bool[] needed, "
    f"ScalarType hidden_dtype, ScalarType weight_dtype, ScalarType bias_dtype, {_LINEAR}, SymInt? rows, "
    "int? chunk_rows, float? filter_eps) -> (Tensor, Tensor, Tensor)",
    # The same gradients over several calls: adds them to float32 (float64) d_hidden, d_weight and d_bias, or overwrites
    # these if they are fresh.
    "linear_logprobs_backward_(Tensor? grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor labels, Tensor? cu_seqlens, Tensor norm, Tensor? store, Tensor shares, Tensor(a!)? d_hidden, "
    f"Tensor(b!)? d_weight, Tensor(c!)? d_bias, bool fresh, {_LINEAR}, SymInt? rows, int? chunk_rows, "
    "float? filter_eps) -> ()",
    # The float32 sums of a gradient, times the upstream scalar if there is one, rounded once to a parameter's dtype.
    "scaled_gradient(Tensor total, Tensor? upstream, ScalarType dtype) -> Tensor",
    # Losses return the loss, its partial derivatives, and other values that they report. The derivatives are (n, B),
    # with respect to the first n tensors, or (B, K), with respect to rewards (B, K).
    # constant_margin and constant_kl are the values for all pairs or answers, if no tensor is given.
    "dpo_loss(Tensor chosen, Tensor rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? chosen_lengths, "
    "Tensor? rejected_lengths, Tensor? margin, Tensor? weights, str loss_type, float loss_weight, float beta, "
    "float label_smoothing, float constant_margin, bool length_normalize, str f_divergence, float f_alpha, "
    "float delta, float gamma, float discopop_tau, float sft_weight, str sft_reduction, str reduction) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    "kto_loss(Tensor logps, Tensor ref_logps, Tensor desirable, Tensor? kl, float constant_kl, float beta, "
    "float desirable_weight, float undesirable_weight, str reduction) -> (Tensor, Tensor, Tensor)",
    "pairwise_reward_loss(Tensor chosen, Tensor rejected, Tensor? margin, float constant_margin, float center_weight, "
    "str reduction) -> (Tensor, Tensor)",
    "best_of_k_loss(Tensor rewards, Tensor best, str reduction) -> (Tensor, Tensor)",
    "ranking_loss(Tensor rewards, Tensor ranks, Tensor? mask, str reduction) -> (Tensor, Tensor)",
    "plackett_luce_loss(Tensor rewards, Tensor ranks, Tensor? mask, str reduction) -> (Tensor, Tensor)",
    # rewards, values and mask (B, T) -> advantages and returns (B, T), through which no gradient flows.
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam) -> (Tensor, Tensor)",
)

# Operators that read values on the host on every device unless they are told the number of scored rows: they check
# labels, or gather those rows. A tag cannot depend on that argument, so no graph of the compiler holds them.
_WAITING = {
    "linear_logprobs",
    "shard_labels",
    "linear_fold",
    "linear_finalize",
    "linear_logprobs_backward",
    "linear_logprobs_backward_",
}


def fuses_losses(device: torch.device) -> bool:
    """Return whether the loss operators have a kernel for this device."""
    return device.type in ("cuda", "xpu") and _HAS_TRITON


def on_host(tensor: Tensor) -> bool:
    """Return whether the host has a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def loss_chunk_rows(weight: Tensor, columns: int | None, dtype: torch.dtype) -> int:
    """Return the default `chunk_rows` of losses from hidden states: how many rows' exponentials are kept at a time.

    Args:
        weight: (V, H), for its device.
        columns: V, or the most columns of a rank of a group; None where only the device knows them.
        dtype: the dtype of the exponentials.
    """
    if on_host(weight):
        assert columns is not None
        return max(1, cpu_linear.LOSS_BYTES // (columns * dtype.itemsize))
    tile = launches.TILE.rows
    limit = tile if columns is None else max(1, linear.LOSS_BYTES // (columns * dtype.itemsize))
    # Use whole tiles, because a part of one costs as many launches.
    return limit - limit % tile if limit > tile else limit


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialized memory on `like`'s device, for large tensors that live until a backward."""
    make = cpu_linear.empty if on_host(like) else linear.empty
    return make(shape, dtype, like.device)


def release_memory(keep: int | None) -> None:
    """Release the memory that operators on a CPU keep for their next call; see `fastpref.release_memory`."""
    cpu_linear.release_memory(keep)


def _launcher(module: str, name: str) -> Any:
    """Return the Triton launcher of an operator. Its module is imported at the first call."""
    kernels = functools.cache(lambda: importlib.import_module(f"fastpref_kernels.triton.{module}"))

    def call(*arguments: Any) -> Any:
        return getattr(kernels(), name)(*arguments)

    return call


def _rows_shape(labels: Tensor, shift: bool) -> tuple[int, ...]:
    """Return (B, T'), the shape of what an operator returns for all positions."""
    return tuple(labels[:, 1:].shape if shift else labels.shape)


def _norm_fake(like: Tensor, stats: int, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty((4 if stats & contract.Statistic.ENTROPY else 3, *rows), dtype=dtype)


def _logprobs_fake(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    *scoring, reduction, stats = options
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = _rows_shape(labels, contract.Scoring(*scoring).shift)
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    reduced = (0,) if reduction == "none" else (sequences,)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(reduced, dtype=dtype),
        _norm_fake(logits, stats, rows, dtype),
        logits.new_empty(reduced, dtype=torch.int32),
        *contract.empty_statistics(logits, contract.STATISTICS, stats, rows, dtype),
    )


def _logprobs_backward_fake(grad: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _fold_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    _, _, *scoring, _, _, _, filter_eps = options
    rows = _rows_shape(labels, contract.Scoring(*scoring).shift)
    chunks = 0 if filter_eps is None else (weight.shape[0] + contract.COLUMNS - 1) // contract.COLUMNS
    sums = hidden.new_empty((len(contract.RowSums._fields), *rows), dtype=torch.float64)
    return sums, hidden.new_empty((chunks, *rows), dtype=torch.float32)


def _result_fake(hidden: Tensor, rows: Sequence[int], masses: Tensor, stats: int) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(tuple(rows), dtype=dtype),
        _norm_fake(hidden, stats, rows, dtype),
        torch.empty_like(masses),
        *contract.empty_statistics(hidden, contract.LINEAR_STATISTICS, stats, rows, dtype),
    )


def _finalize_fake(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, sums, _, masses, *options = arguments
    *_, stats, _, _ = options
    return _result_fake(hidden, sums.shape[1:], masses, stats)


def _linear_fake(hidden: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    sums, masses = _fold_fake(hidden, *arguments)
    *_, stats, _, _, _ = arguments
    return _result_fake(hidden, sums.shape[1:], masses, stats)


def _linear_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, hidden, weight, bias, _, _, _, _, _, needed, *dtypes = arguments[:14]
    return tuple(
        hidden.new_empty(tensor.shape if want and tensor is not None else (0,), dtype=dtype)
        for tensor, want, dtype in zip((hidden, weight, bias), needed, dtypes, strict=True)
    )


def _loss_fake(reduction: str, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    tensors = [tensor for tensor in given if tensor is not None]
    shape = tensors[0].shape
    dtype = contract.widened(*(tensor.dtype for tensor in tensors))
    loss = tensors[0].new_empty(shape[:1] if reduction == "none" else (), dtype=dtype)
    return loss, loss.new_empty(shape if len(shape) == 2 else (len(tensors), *shape))


def _dpo_fake(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    *_, reduction = options
    loss, partials = _loss_fake(reduction, chosen, rejected, ref_chosen, ref_rejected)
    return loss, partials, loss.new_empty(chosen.shape), loss.new_empty(chosen.shape)


def _kto_fake(logps: Tensor, ref_logps: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, reduction = options
    loss, partials = _loss_fake(reduction, logps, ref_logps)
    return loss, partials, loss.new_empty(logps.shape)


def _pairwise_fake(chosen: Tensor, rejected: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, reduction = options
    return _loss_fake(reduction, chosen, rejected)


def _group_fake(rewards: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *_, reduction = options
    return _loss_fake(reduction, rewards)


def _gae_fake(rewards: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = contract.widened(rewards.dtype, values.dtype)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _implement(key: str, logprobs: Any, logprobs_backward: Any, empty_like: Any = torch.empty_like) -> None:
    """Register a device's log-probs, and their gradient: in fresh memory, and written over the logits.

    Args:
        key: the dispatch key.
        logprobs: implements `fastpref::logprobs`.
        logprobs_backward: writes the gradient to its first argument, which may be the logits; the rest are those of
            `fastpref::logprobs_backward`.
        empty_like: makes the memory for a fresh gradient.
    """

    def fresh(grad: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
        out = empty_like(logits)
        logprobs_backward(out, grad, grad_entropy, logits, *rest)
        return out

    def in_place(grad: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any) -> None:
        logprobs_backward(logits, grad, grad_entropy, logits, *rest)

    _LIBRARY.impl("logprobs", logprobs, key)
    _LIBRARY.impl("logprobs_backward", fresh, key)
    _LIBRARY.impl("logprobs_backward_", in_place, key)


def _implement_linear(key: str, backend: linear.Backend, module: Any = linear) -> None:
    """Register log-probs from hidden states on a device's products and row passes.

    Args:
        key: the dispatch key.
        backend: the products and row passes.
        module: the module whose functions run the whole operators; the functions of `linear` run their parts.
    """
    for name in ("linear_logprobs", "linear_logprobs_backward", "linear_logprobs_backward_"):
        _LIBRARY.impl(name, functools.partial(getattr(module, name), backend), key)
    for name in ("linear_fold", "linear_finalize", "scaled_gradient"):
        _LIBRARY.impl(name, functools.partial(getattr(linear, name), backend), key)


def triton_backend() -> linear.Backend:
    """Return the backend of a device that Triton compiles for: library products, and our row passes."""
    return linear.library_backend(
        _launcher("linear", "fold"), _launcher("linear", "fold_backward"), lambda: launches.TILE,
        product_fold=_launcher("product", "product_fold"), filtered=_launcher("filtered", "filtered_gradients"),
        **{name: _launcher("rows", name) for name in ("dot", "gather", "scatter", "rescale")},
    )  # fmt: skip


def _implement_triton(key: str) -> None:
    """Register the Triton launchers."""
    _LIBRARY.impl("gae", _launcher("gae", "gae"), key)
    _implement(key, _launcher("logprobs", "logprobs"), _launcher("logprobs", "logprobs_backward"))
    _implement_linear(key, triton_backend())
    for name, module in LOSSES.items():
        _LIBRARY.impl(name, _launcher(module, name), key)


def _register() -> None:
    uncapturable = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))
    for schema in _SCHEMAS:
        waits = schema.partition("(")[0] in _WAITING
        tags = (torch.Tag.pt2_compliant_tag, *(uncapturable if waits else ()))
        _LIBRARY.define(schema, tags=tags)
    _implement("CPU", cpu.logprobs, cpu.logprobs_backward, cpu_linear.empty_like)
    _implement_linear("CPU", cpu_linear.BACKEND, cpu_linear)
    _implement("CompositeExplicitAutograd", eager.logprobs, eager.logprobs_backward)
    _implement_linear("CompositeExplicitAutograd", linear.library_backend(linear.fold, linear.fold_backward))
    _LIBRARY.impl("gae", gae.gae, "CompositeExplicitAutograd")
    _LIBRARY.impl("shard_labels", linear.shard_labels, "CompositeExplicitAutograd")
    if _HAS_TRITON:
        for key in TRITON_KEYS:
            _implement_triton(key)
    for name, fake in {
        "logprobs": _logprobs_fake,
        "logprobs_backward": _logprobs_backward_fake,
        "logprobs_backward_": lambda *_: None,
        "linear_logprobs": _linear_fake,
        "shard_labels": lambda labels, *_: torch.empty_like(labels, dtype=torch.int64),
        "linear_fold": _fold_fake,
        "linear_finalize": _finalize_fake,
        "linear_logprobs_backward_": lambda *_: None,
        "linear_logprobs_backward": _linear_backward_fake,
        "scaled_gradient": lambda total, _, dtype: torch.empty_like(total, dtype=dtype),
        "dpo_loss": _dpo_fake,
        "pairwise_reward_loss": _pairwise_fake,
        "best_of_k_loss": _group_fake,
        "ranking_loss": _group_fake,
        "plackett_luce_loss": _group_fake,
        "kto_loss": _kto_fake,
        "gae": _gae_fake,
    }.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


_register()
