"""Training steps under DDP, FSDP2 and context parallelism, and with a sharded head, against one process."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import close, main, mesh, over, own
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import fastpref
from fastpref.distributed import sum_parts

VOCABULARY, PAIRS, LENGTH = 131, 4, 10  # two ranks do not divide the vocabulary


def model(tied: bool = False, heads: int = 1) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    made = LlamaForCausalLM(config)
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return fastpref.attach(made)


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids and labels (2B, T) of [chosen; rejected], and the reference's log-probs (2B,)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH), generator=generator)
    labels = ids.clone()
    for row in range(2 * PAIRS):
        labels[row, : 2 + row % 3] = -100
    return ids, labels, torch.randn(2 * PAIRS, generator=generator) - 40


def of_rank(rows: Tensor) -> Tensor:
    """Return this rank's pairs of [chosen; rejected]."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return torch.cat([half.chunk(ranks)[rank] for half in rows.chunk(2)])


def by_logprobs(model: Any, ids: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
    logps = model(input_ids=ids, labels=labels, fastpref=True, reduction="sum").logprobs
    return fastpref.dpo_loss(*logps.chunk(2), *ref.chunk(2)).loss


def in_the_forward(model: Any, ids: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
    chosen, rejected = ref.chunk(2)
    score = functools.partial(
        fastpref.linear_dpo_loss, ref_chosen_logps=chosen, ref_rejected_logps=rejected, chunk_rows=16
    )
    return model(input_ids=ids, labels=labels, fastpref=score).loss


STEPS: dict[str, Callable[..., Tensor]] = {"logprobs": by_logprobs, "loss": in_the_forward}


def whole_gradients(step: str, tied: bool = False, heads: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    one = model(tied, heads)
    loss = STEPS[step](one, *pairs())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in one.named_parameters()}


def local(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def hold(loss: Tensor, named: Any, wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    close(mean / dist.get_world_size(), wanted[0], 1e-6)
    found = {name.removeprefix("module."): local(parameter.grad) for name, parameter in named}
    assert found.keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        close(found[name], gradient, 5e-6)


@over(step=list(STEPS), tied=[False, True])
def ddp(step: str, tied: bool) -> None:
    wrapped = DistributedDataParallel(model(tied))
    loss = STEPS[step](wrapped, *map(of_rank, pairs()))
    loss.backward()
    hold(loss, wrapped.named_parameters(), whole_gradients(step, tied))


@over(step=list(STEPS), tied=[False, True], head=["of the root", "a unit", "a unit with the norm"])
def fsdp2(step: str, tied: bool, head: str) -> None:
    sharded = model(tied)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh())
    if head == "a unit" and not tied:
        fully_shard(sharded.lm_head, mesh=mesh())
    if head == "a unit with the norm" and not tied:
        fully_shard([sharded.model.norm, sharded.lm_head], mesh=mesh())
    fully_shard(sharded, mesh=mesh())
    loss = STEPS[step](sharded, *map(of_rank, pairs()))
    loss.backward()
    hold(loss, sharded.named_parameters(), whole_gradients(step, tied))


@over(step=list(STEPS))
def fsdp2_accumulates(step: str) -> None:
    """Two half batches whose gradients are reduced at the second give the gradients of the whole batch."""
    sharded = model()
    fully_shard(sharded, mesh=mesh())
    ids, labels, ref = map(of_rank, pairs())
    total = torch.zeros(())
    for half in range(2):
        sharded.set_requires_gradient_sync(half == 1)
        rows = [torch.cat([part.chunk(2)[half] for part in rows.chunk(2)]) for rows in (ids, labels, ref)]
        loss = STEPS[step](sharded, *rows) / 2
        loss.backward()
        total += loss.detach()
    hold(total, sharded.named_parameters(), whole_gradients(step))


class Backbone(nn.Module):
    """Hidden states of tokens, and a head that is held apart."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.mix = nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16)
        self.head = head

    def forward(self, ids: Tensor, labels: Tensor, ref: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embed(ids)))
        return fastpref.linear_dpo_loss(hidden, self.head.weight, labels, *ref.chunk(2), chunk_rows=16).loss


@over(wrapper=["ddp", "fsdp2"])
def sharded_head_under(wrapper: str) -> None:
    """A head split by the vocabulary on one dimension of a mesh, the rest data-parallel on the other."""
    grid = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(4)
    weight = torch.randn(VOCABULARY, 16)

    def build(place: Callable[[Tensor], Tensor]) -> Backbone:
        head = nn.Linear(16, VOCABULARY, bias=False)
        head.weight = nn.Parameter(place(weight.clone()))
        return Backbone(head)

    one, split = build(lambda whole: whole), build(lambda whole: distribute_tensor(whole, grid["tp"], [Shard(0)]))
    if wrapper == "fsdp2":
        run = fully_shard(split, mesh=grid["dp"])
    else:
        ignored = ["head.weight"]  # of the other dimension; DDP would take it for one of its own
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(split, ignored)
        run = DistributedDataParallel(split, process_group=grid["dp"].get_group())
    loss, wanted = run(*pairs()), one(*pairs())
    close(loss.detach(), wanted.detach(), 1e-6)
    loss.backward()
    wanted.backward()
    for (name, found), parameter in zip(split.named_parameters(), one.parameters(), strict=True):
        assert name.split(".")[0] in ("embed", "mix", "head")
        close(local(found.grad), parameter.grad, 5e-6)


# Llama's layers by tensor parallelism; the head's logits would be split, whole, or a DTensor.
PLAN = {
    **{f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
}
HEADS = {
    "split": ColwiseParallel(),
    "whole": ColwiseParallel(output_layouts=Replicate()),
    "dtensor": ColwiseParallel(use_local_output=False),
}


@over(step=list(STEPS), head=list(HEADS), wrapper=["none", "fsdp2"])
def tensor_parallel_model(step: str, head: str, wrapper: str) -> None:
    grid = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    sharded = model(heads=2)
    parallelize_module(sharded, grid["tp"], {**PLAN, "lm_head": HEADS[head]})
    if wrapper == "fsdp2":
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=grid["dp"])
        fully_shard(sharded, mesh=grid["dp"])
    ids, labels, ref = pairs()
    logits = sharded(input_ids=ids).logits  # the plain call is as it was
    assert logits.shape[-1] in (VOCABULARY, own(torch.empty(VOCABULARY)).shape[0])
    for _ in range(2):  # the first scored call is checked, the second not
        loss = STEPS[step](sharded, ids, labels, ref)
    loss.backward()
    hold(loss, sharded.named_parameters(), whole_gradients(step, heads=2))


@over(form=["logits", "hidden"])
def context_parallel(form: str) -> None:
    """Each rank holds half of the positions of every sequence, with labels that were shifted before the cut."""
    _, labels, ref = pairs()
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.manual_seed(5)
    hidden, weight = torch.randn(2 * PAIRS, LENGTH, 16), torch.randn(VOCABULARY, 16)

    def step(hidden: Tensor, weight: Tensor, labels: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        if form == "logits":
            logps = fastpref.sequence_logprobs(hidden @ weight.T, labels, shift=False)
        else:
            logps = fastpref.linear_sequence_logprobs(hidden, weight, labels, shift=False)
        return fastpref.dpo_loss(*total(logps).chunk(2), *ref.chunk(2)).loss

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    parts = [own(hidden, 1).requires_grad_(), weight.clone().requires_grad_()]
    wanted = step(*leaves, following, lambda logps: logps)
    found = step(*parts, own(following, 1), lambda logps: sum_parts(logps, dist.group.WORLD))
    close(found.detach(), wanted.detach(), 1e-6)
    wanted.backward()
    found.backward()
    close(parts[0].grad, own(leaves[0].grad, 1), 2e-6)
    dist.all_reduce(parts[1].grad)
    close(parts[1].grad, leaves[1].grad, 2e-6)


def refused(error: type[Exception], word: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(word)):
        call()


@over()
def a_head_outside_of_its_wrapper_is_refused() -> None:
    """FSDP2's weights are DTensors that look like a split vocabulary, but each rank has its own batch."""
    sharded = model()
    group = dist.new_group()  # of its own: what is alike on the ranks of a group is looked at once
    fully_shard(sharded, mesh=DeviceMesh.from_group(group, "cpu"))
    _, labels, _ = map(of_rank, pairs())
    hidden = torch.randn(PAIRS, LENGTH, 16) + dist.get_rank()
    outside = functools.partial(fastpref.linear_sequence_logprobs, hidden, sharded.lm_head.weight, labels)
    refused(ValueError, "inside the wrapped module's forward", outside)


@over()
def placements_that_are_no_split_of_the_vocabulary_are_refused() -> None:
    _, labels, _ = pairs()
    hidden, weight = torch.randn(2 * PAIRS, LENGTH, 16), torch.randn(VOCABULARY, 16)
    grid = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))

    def score(weight: Any, hidden: Any = hidden, **options: Any) -> Any:
        return fastpref.linear_token_logprobs(hidden, weight, labels, **options)

    by_features = distribute_tensor(weight, mesh(), [Shard(1)])
    refused(ValueError, "Shard(0)", lambda: score(by_features))
    twice = distribute_tensor(weight, grid, [Shard(0), Shard(0)])
    refused(ValueError, "one dimension of its mesh", lambda: score(twice))
    split = distribute_tensor(weight, mesh(), [Shard(0)])
    refused(ValueError, "no process_group", lambda: score(split, process_group=dist.group.WORLD))
    refused(ValueError, "weight is not", lambda: score(weight, hidden=distribute_tensor(hidden, mesh(), [Replicate()])))
    refused(ValueError, 'mesh["tp"]', lambda: score(weight, process_group=grid))
    refused(TypeError, "ProcessGroup", lambda: score(weight, process_group="tp"))
    other = distribute_tensor(hidden, grid["tp"], [Replicate()])
    whole = distribute_tensor(weight, mesh(), [Replicate()])
    refused(ValueError, "whether the ranks share", lambda: score(whole))
    replicated = distribute_tensor(hidden, mesh(), [Replicate()])
    close(score(whole, hidden=replicated), score(weight), 1e-7)
    plain = functools.partial(score, split, bias=torch.zeros(VOCABULARY))
    refused(ValueError, "bias must be a DTensor", plain)
    logits = distribute_tensor(torch.randn(2 * PAIRS, LENGTH, 8), grid, [Replicate(), Shard(2)])
    close(fastpref.token_logprobs(logits, labels % 8), fastpref.token_logprobs(logits.full_tensor(), labels % 8), 1e-6)
    sent = distribute_tensor(labels, mesh(), [Replicate()])
    refused(ValueError, "labels are a DTensor", lambda: fastpref.token_logprobs(torch.randn(8, 10, 131), sent))
    if grid["tp"] != mesh():
        refused(ValueError, "mesh", lambda: score(split, hidden=other))
    wide = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))
    both = distribute_tensor(weight, wide, [Replicate(), Shard(0)])
    refused(ValueError, "on one dimension", lambda: score(both))
    over = distribute_tensor(torch.randn(2 * PAIRS, LENGTH, 8), wide, [Replicate(), Shard(2)])
    refused(ValueError, "on one dimension", lambda: fastpref.token_logprobs(over, labels % 8))
    batches = distribute_tensor(hidden, wide, [Shard(0), Replicate()])
    refused(ValueError, "splits the batch", lambda: score(both, hidden=batches))
    partial = torch.distributed.tensor.DTensor.from_local(weight, mesh(), [Partial()])
    refused(ValueError, "Shard(0)", lambda: score(partial))


@over()
def hidden_states_split_over_the_vocabularys_ranks_are_gathered() -> None:
    """With sequence parallelism around a sharded head, Shard(1) hidden states get the gradient of their own part."""
    _, labels, ref = pairs()
    torch.manual_seed(6)
    hidden, weight = torch.randn(2 * PAIRS, LENGTH, 16), torch.randn(VOCABULARY, 16)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    parts = [distribute_tensor(x, mesh(), [Shard(dim)]).requires_grad_() for x, dim in ((hidden, 1), (weight, 0))]
    losses = [fastpref.linear_dpo_loss(*given, labels, *ref.chunk(2)).loss for given in (leaves, parts)]
    for loss in losses:
        loss.backward()
    close(losses[1].detach(), losses[0].detach(), 1e-6)
    for part, leaf in zip(parts, leaves, strict=True):
        assert part.grad.placements == part.placements
        close(part.grad.full_tensor(), leaf.grad, 2e-6)


@over(form=["linear", "logits"])
def compiled(form: str) -> None:
    """A step with its collectives compiles to one graph."""
    _, labels, ref = pairs()
    torch.manual_seed(7)
    hidden, weight = torch.randn(2 * PAIRS, LENGTH, 16), own(torch.randn(VOCABULARY, 16))

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        group: dict[str, Any] = {"process_group": dist.group.WORLD}
        if form == "linear":
            return fastpref.linear_dpo_loss(hidden, weight, labels, *ref.chunk(2), **group).loss
        logps = fastpref.sequence_logprobs(hidden @ weight.T, labels, **group)
        return fastpref.dpo_loss(*logps.chunk(2), *ref.chunk(2)).loss

    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = run(*leaves)
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        close(b, a, 1e-6)


if __name__ == "__main__":
    main()
