"""DPO on one process or on a grid of processes: FSDP2 over the data, tensor parallelism over layers and vocabulary.

    pip install '.[demo]'
    python examples/dpo_fsdp_tp.py                                                # one CPU, or one GPU
    torchrun --nproc-per-node 2 examples/dpo_fsdp_tp.py                           # pairs over two ranks
    torchrun --nproc-per-node 2 examples/dpo_fsdp_tp.py --tp 2                    # layers and vocabulary over two
    torchrun --nproc-per-node 8 examples/dpo_fsdp_tp.py --tp 4 --vocabulary 128256 --hidden 2048 --layers 16

The batch and the loss are the same on every grid. A prompt counts up from a random token. Its chosen answer continues
the count; its rejected answer does so with half of its tokens replaced by random ones. Nothing is downloaded.
"""

import argparse
import copy
import functools
import os

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

import fastpref

PROMPT, ANSWER = 4, 12
PLAN = {
    **{f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(),  # each rank has V/P rows of the head, which fastpref takes as they are
}


def pairs(number: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return input ids and labels (2·number, T) of [chosen; rejected]."""
    start = torch.randint(vocabulary, (number, 1), generator=generator)
    chosen = (start + torch.arange(PROMPT + ANSWER)) % vocabulary
    drawn = torch.randint(vocabulary, chosen.shape, generator=generator)
    wrong = (torch.rand(chosen.shape, generator=generator) < 0.5) & (torch.arange(PROMPT + ANSWER) >= PROMPT)
    ids = torch.cat([chosen, torch.where(wrong, drawn, chosen)])
    return ids, torch.where(torch.arange(PROMPT + ANSWER) < PROMPT, -100, ids)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="DPO with FSDP2 and tensor parallelism.")
    parser.add_argument("--tp", type=int, default=1, help="ranks that split layers and vocabulary")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="pairs a step, over all ranks")
    parser.add_argument("--vocabulary", type=int, default=1021)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args(arguments)

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kind = accelerator.type if accelerator else "cpu"
    device, ranks, mesh = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) if accelerator else None), 1, None
    if "RANK" in os.environ:
        if accelerator:
            torch.accelerator.set_device_index(device.index)
        dist.init_process_group(device_id=device if accelerator else None)
        ranks = dist.get_world_size()
    if ranks % args.tp or args.batch % (ranks // args.tp):
        parser.error(f"--tp must divide the ranks, {ranks}, and the rest of them --batch; got {args.tp}, {args.batch}")
    if ranks > 1:
        mesh = init_device_mesh(kind, (ranks // args.tp, args.tp), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    policy = fastpref.attach(LlamaForCausalLM(config)).to(device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    if mesh is not None:
        for model in (policy, reference):
            if args.tp > 1:
                parallelize_module(model, mesh["tp"], PLAN)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, foreach=False)

    generator, losses, first = torch.Generator().manual_seed(1), [], not dist.is_initialized() or dist.get_rank() == 0
    group, part = (ranks // args.tp, mesh.get_local_rank("dp")) if mesh is not None else (1, 0)
    for _ in track(range(args.steps), description=f"DPO on {group} × {args.tp} ranks", disable=not first):
        ids, labels = (
            torch.cat([half.chunk(group)[part] for half in rows.chunk(2)]).to(device)
            for rows in pairs(args.batch, args.vocabulary, generator)
        )
        with torch.no_grad():
            ref = reference(input_ids=ids, labels=labels, fastpref=True, reduction="sum").logprobs
        # The model calls it in place of its head, inside the wrapped forward, where the head's weight is gathered.
        score = functools.partial(
            fastpref.linear_dpo_loss, ref_chosen_logps=ref.chunk(2)[0], ref_rejected_logps=ref.chunk(2)[1], beta=0.5
        )
        loss = policy(input_ids=ids, labels=labels, fastpref=score).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        if mesh is not None:
            dist.all_reduce(mean, dist.ReduceOp.AVG if accelerator else dist.ReduceOp.SUM)
            mean = mean if accelerator else mean / ranks
        losses.append(mean.item())
    if first:
        print(
            f"loss on {group} × {args.tp} ranks: {losses[0]:.6f} at first, {losses[-1]:.6f} after {len(losses)} steps"
        )
    if dist.is_initialized():
        dist.barrier()  # a rank that exits early closes the connections of ranks that still wait
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
