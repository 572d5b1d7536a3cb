"""Every operator of fastpref: its schema, its fake and its dispatch. The one door between the two packages.

PyTorch's dispatcher picks the kernel: C++ for a CPU, Triton for CUDA, ROCm and XPU devices, and the chunked PyTorch of
`eager.py` for whatever is left. The operators know nothing of autograd: forward and backward are operators of their
own, and the `torch.autograd.Function`s that pair them live in `fastpref`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels import cpu, eager, gae, linear
from fastpref_kernels.cpu import linear as cpu_linear
from fastpref_kernels.triton import launches

NAMESPACE = "fastpref"
UNSCORED, INVALID = linear.UNSCORED, linear.INVALID
Rows = linear.Rows
boundaries_are_wrong = eager.boundaries_are_wrong
TRITON_KEYS = ("CUDA", "XPU")
# Importing it is left to the first launch.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# Operators that give a loss, its partial derivatives and what is reported beside it, and the files of their kernels.
LOSSES = {
    "dpo_loss": "preference",
    "kto_loss": "preference",
    "pairwise_reward_loss": "reward",
    "best_of_k_loss": "reward",
    "ranking_loss": "reward",
    "plackett_luce_loss": "reward",
}

# The arguments that forward and backward share, in this order, after the tensors of each.
_LINEAR = "int ignore_index, bool shift, float logit_scale, float temperature, float? softcap"
_SCORING = f"{_LINEAR}, str reduction"

_SCHEMAS = (
    # logits (B, T, V), labels (B, T), cu_seqlens (S+1,) with B = 1, weights (B, T').  T' = T - 1 with shift, else T.
    # -> logps (B, T'), sequences (S,), norm (3 or 4, B, T'), counts (S,), and the statistics (B, T'), empty where not
    #    asked: lse, entropy, mean_logits, is_top1, log_sum_sq_probs (bit i of `stats` asks for the i-th). norm is what
    #    the backward needs: a and 1/S of softmax_j = exp(z_j - rate * a)/S, where z = rate * u(logits), logp, and with
    #    it the entropy. Where a statistic but lse is asked for, a is u's maximum.
    f"logprobs(Tensor logits, Tensor labels, Tensor? cu_seqlens, Tensor? weights, {_SCORING}, int stats) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # grad is (B, T') with reduction "none", else (S,); grad_entropy (B, T'). -> the gradient of logits, (B, T, V)
    "logprobs_backward(Tensor? grad, Tensor? grad_entropy, Tensor logits, Tensor labels, Tensor? cu_seqlens, "
    f"Tensor? weights, Tensor norm, Tensor counts, {_SCORING}) -> Tensor",
    "logprobs_backward_(Tensor? grad, Tensor? grad_entropy, Tensor(a!) logits, Tensor labels, Tensor? cu_seqlens, "
    f"Tensor? weights, Tensor norm, Tensor counts, {_SCORING}) -> ()",
    # hidden (B, T, H), weight (V, H), bias (V,), the rest as above. store: (rows, V) or None, rows no fewer than are
    # scored: receives what the backward's products need, in a dtype of float32's range. rows: how many are scored, or
    # more, of labels that are in range; None: the host reads it and checks them. chunk_rows: the most rows of a tile.
    # -> logps, norm, the softmax mass of every tile (chunks, B, T') where filter_eps asks for it, and the statistics,
    #    the last of them what filter_eps drops.
    "linear_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens, Tensor(a!)? store, "
    f"{_LINEAR}, int stats, SymInt? rows, int? chunk_rows, float? filter_eps) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # The same in parts, for a weight whose rows are a shard of the vocabulary. shard: int64 (2,), its first column and
    # the number of all. shard_labels checks labels, and makes of them columns of the shard, or what lies outside it.
    # linear_fold: the sums of each row (8, B, T') float64, as linear.fold has them, and each tile's mass at the row's
    # anchor. linear_finalize: linear_logprobs' results, from those sums and the sums over all shards. With `checks`, a
    # label that is in no shard is an error, and else its row is NaN.
    "shard_labels(Tensor labels, Tensor? cu_seqlens, Tensor shard, int columns, int ignore_index, bool shift, "
    "bool checks) -> Tensor",
    "linear_fold(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens, Tensor(a!)? store, "
    f"{_LINEAR}, int stats, SymInt? rows, int? chunk_rows, float? filter_eps) -> (Tensor, Tensor)",
    "linear_finalize(Tensor hidden, Tensor labels, Tensor? cu_seqlens, Tensor shard, Tensor sums, Tensor whole_sums, "
    f"Tensor masses, Tensor(a!)? store, {_LINEAR}, int stats, SymInt? rows, "
    "float? filter_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # grad and grad_entropy (B, T'). -> the gradients of hidden, weight and bias that are needed, in these dtypes; empty
    # where not. A label outside of the weight's rows is another shard's: the row has no label here. The dtypes are
    # three arguments and not a ScalarType[], whose elements reach Python as integers before torch 2.12.
    "linear_logprobs_backward(Tensor? grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor labels, Tensor? cu_seqlens, Tensor norm, Tensor? store, Tensor shares, bool[] needed, "
    f"ScalarType hidden_dtype, ScalarType weight_dtype, ScalarType bias_dtype, {_LINEAR}, SymInt? rows, "
    "int? chunk_rows, float? filter_eps) -> (Tensor, Tensor, Tensor)",
    # The same sums, over calls. Adds to float32 (float64) d_hidden, d_weight and d_bias, or, where they are fresh,
    # fills them.
    "linear_logprobs_backward_(Tensor? grad, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor labels, Tensor? cu_seqlens, Tensor norm, Tensor? store, Tensor shares, Tensor(a!)? d_hidden, "
    f"Tensor(b!)? d_weight, Tensor(c!)? d_bias, bool fresh, {_LINEAR}, SymInt? rows, int? chunk_rows, "
    "float? filter_eps) -> ()",
    # A gradient's float32 sums, times the upstream scalar if there is one, rounded once, to a parameter's dtype.
    "scaled_gradient(Tensor total, Tensor? upstream, ScalarType dtype) -> Tensor",
    # Losses: the loss, its partial derivatives, (n, B) by the first n tensors or (B, K) by rewards (B, K), and what is
    # reported.
    # constant_margin and constant_kl are what is the same for all, where no tensor is given.
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
    # rewards, values and mask (B, T) -> advantages and returns (B, T), which no gradient passes.
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam) -> (Tensor, Tensor)",
)

# Operators that read values on the host on every device, if they are not told the number of scored rows: they check
# labels, or gather those rows. What they are told is no part of a tag, so no graph of the compiler's holds them.
_WAITING = {
    "linear_logprobs",
    "shard_labels",
    "linear_fold",
    "linear_finalize",
    "linear_logprobs_backward",
    "linear_logprobs_backward_",
}


def fuses_losses(device: torch.device) -> bool:
    """Whether the loss operators have a kernel for this device."""
    return device.type in ("cuda", "xpu") and _HAS_TRITON


def on_host(tensor: Tensor) -> bool:
    """Return whether the host has a tensor's values without waiting for a device."""
    return tensor.device.type == "cpu"


def loss_chunk_rows(weight: Tensor, columns: int | None, dtype: torch.dtype) -> int:
    """Return how many rows' exponentials a loss from hidden states keeps at a time if it is not told.

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
    # Whole tiles, because a part of one costs as many launches.
    return limit - limit % tile if limit > tile else limit


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialised memory on `like`'s device, for what is large and lives until a backward."""
    make = cpu_linear.empty if on_host(like) else linear.empty
    return make(shape, dtype, like.device)


def release_memory(keep: int | None) -> None:
    """Give back what operators on a CPU keep for their next call."""
    cpu_linear.release_memory(keep)


def _launcher(module: str, name: str) -> Any:
    """The Triton launcher of an operator, imported when it is first called."""
    kernels = functools.cache(lambda: importlib.import_module(f"fastpref_kernels.triton.{module}"))

    def call(*arguments: Any) -> Any:
        return getattr(kernels(), name)(*arguments)

    return call


def _logprobs_fake(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, weights: Tensor | None, ignore_index: int, shift: bool,
    logit_scale: float, temperature: float, softcap: float | None, reduction: str, stats: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = tuple(labels[:, 1:].shape if shift else labels.shape)
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def statistic(bit: int, kind: torch.dtype) -> Tensor:
        return logits.new_empty(rows if stats >> bit & 1 else (0,), dtype=kind)

    reduced = () if reduction == "none" else (sequences,)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(reduced or (0,), dtype=dtype),
        logits.new_empty((4 if stats & 2 else 3, *rows), dtype=dtype),
        logits.new_empty(reduced or (0,), dtype=torch.int32),
        *(statistic(bit, torch.bool if bit == 3 else dtype) for bit in range(5)),
    )


def _logprobs_backward_fake(grad: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _fold_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    store: Tensor | None, ignore_index: int, shift: bool, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = tuple(labels[:, 1:].shape if shift else labels.shape)
    chunks = 0 if rest[-1] is None else (weight.shape[0] + linear.COLUMNS - 1) // linear.COLUMNS
    return hidden.new_empty((8, *rows), dtype=torch.float64), hidden.new_empty((chunks, *rows), dtype=torch.float32)


def _finalize_fake(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shard: Tensor, sums: Tensor, whole_sums: Tensor,
    masses: Tensor, store: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *_, stats, _, _ = rest
    dtype, rows = torch.promote_types(hidden.dtype, torch.float32), sums.shape[1:]
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty((4 if stats & 2 else 3, *rows), dtype=dtype),
        torch.empty_like(masses),
        *(
            hidden.new_empty(rows if stats >> bit & 1 else (0,), dtype=torch.bool if bit == 3 else dtype)
            for bit in range(6)
        ),
    )


def _linear_fake(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, _, _, labels, cu_seqlens, store, *scoring, stats, rows, _, filter_eps = arguments
    sums, masses = _fold_fake(*arguments)
    given = (hidden, labels, cu_seqlens, labels, sums, sums, masses, store)
    return _finalize_fake(*given, *scoring, stats, rows, filter_eps)


def _linear_backward_fake(
    grad: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    labels: Tensor, cu_seqlens: Tensor | None, norm: Tensor, store: Tensor | None, shares: Tensor,
    needed: list[bool], hidden_dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtypes = (hidden_dtype, weight_dtype, bias_dtype)
    return tuple(
        hidden.new_empty(tensor.shape if want and tensor is not None else (0,), dtype=dtype)
        for tensor, want, dtype in zip((hidden, weight, bias), needed, dtypes, strict=True)
    )


def _loss_fake(reduction: str, *given: Tensor | None) -> tuple[Tensor, Tensor]:
    tensors = [tensor for tensor in given if tensor is not None]
    shape = tensors[0].shape
    dtype = linear.widened(*(tensor.dtype for tensor in tensors))
    loss = tensors[0].new_empty(shape[:1] if reduction == "none" else (), dtype=dtype)
    return loss, loss.new_empty(shape if len(shape) == 2 else (len(tensors), *shape))


def _dpo_fake(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    loss, partials = _loss_fake(rest[-1], chosen, rejected, ref_chosen, ref_rejected)
    return loss, partials, loss.new_empty(chosen.shape), loss.new_empty(chosen.shape)


def _kto_fake(logps: Tensor, ref_logps: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, partials = _loss_fake(rest[-1], logps, ref_logps)
    return loss, partials, loss.new_empty(logps.shape)


def _pairwise_fake(chosen: Tensor, rejected: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _loss_fake(rest[-1], chosen, rejected)


def _group_fake(rewards: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _loss_fake(rest[-1], rewards)


def _gae_fake(rewards: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = linear.widened(rewards.dtype, values.dtype)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _implement(key: str, logprobs: Any, write_gradient: Any, empty_like: Any = torch.empty_like) -> None:
    """Register a backend's log-probs, and its gradient both in fresh memory and over the logits."""

    def fresh(grad: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any) -> Tensor:
        out = empty_like(logits)
        write_gradient(out, grad, grad_entropy, logits, *rest)
        return out

    def in_place(grad: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *rest: Any) -> None:
        write_gradient(logits, grad, grad_entropy, logits, *rest)

    _LIBRARY.impl("logprobs", logprobs, key)
    _LIBRARY.impl("logprobs_backward", fresh, key)
    _LIBRARY.impl("logprobs_backward_", in_place, key)


def _implement_linear(key: str, backend: linear.Backend, module: Any = linear) -> None:
    """Register log-probs from hidden states on a backend's products and row passes, by a module's functions."""
    _LIBRARY.impl("linear_logprobs", functools.partial(module.logprobs, backend), key)
    _LIBRARY.impl("linear_fold", functools.partial(linear.fold_shard, backend), key)
    _LIBRARY.impl("linear_finalize", functools.partial(linear.finalize_shard, backend), key)
    _LIBRARY.impl("linear_logprobs_backward_", functools.partial(module.accumulate_gradients, backend), key)
    _LIBRARY.impl("linear_logprobs_backward", functools.partial(module.gradients, backend), key)
    _LIBRARY.impl("scaled_gradient", functools.partial(linear.scaled_gradient, backend), key)


def triton_backend() -> linear.Backend:
    """Return the backend of a device that Triton compiles for: the library's products, and our row passes."""
    return linear.library_backend(
        _launcher("linear", "fold"), _launcher("linear", "fold_backward"), lambda: launches.TILE,
        product_fold=_launcher("product", "product_fold"), filtered=_launcher("filtered", "filtered_gradients"),
        **{name: _launcher("rows", name) for name in ("dot", "gather", "scatter", "rescale")},
    )  # fmt: skip


def _implement_triton(key: str) -> None:
    """Register the Triton launchers."""
    _LIBRARY.impl("gae", _launcher("rlhf", "gae"), key)
    _implement(key, _launcher("logprobs", "logprobs"), _launcher("logprobs", "write_gradient"))
    _implement_linear(key, triton_backend())
    for name, module in LOSSES.items():
        _LIBRARY.impl(name, _launcher(module, name), key)


def _register() -> None:
    uncapturable = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))
    for schema in _SCHEMAS:
        waits = schema.partition("(")[0] in _WAITING
        tags = (torch.Tag.pt2_compliant_tag, *(uncapturable if waits else ()))
        _LIBRARY.define(schema, tags=tags)
    _implement("CPU", cpu.logprobs, cpu.write_gradient, cpu_linear.empty_like)
    _implement_linear("CPU", cpu_linear.BACKEND, cpu_linear)
    _implement("CompositeExplicitAutograd", eager.logprobs, eager.write_gradient)
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
