"""What of PyTorch works around fastpref's functions: the table of docs/compatibility.md, every cell of it a test.

A column is a small training step, from ids and labels to a loss. A row does to a step what its users do.
"""

from __future__ import annotations

import ast
import copy
import functools
import pickle
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastpref
from fastpref_kernels import linear, ops

ROOT = Path(__file__).parents[2]
VOCABULARY, WIDTH = 61, 16

pytestmark = [
    pytest.mark.usefixtures("unpoisoned"),
    # The compiler's own imports and code use what the newest Python deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


def of_pairs(logps: Tensor) -> Tensor:
    """DPO without a reference in plain PyTorch, of (2B,) log-probs."""
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


class Step(nn.Module):
    """A model of one layer, and the loss it is trained by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def heads(self) -> nn.Module:
        """The module that holds the head."""
        return self

    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.score(torch.tanh(self.embed(ids)), labels)


class Logits(Step):
    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(hidden)
        tokens = fastpref.token_logprobs(logits, labels)
        return of_pairs(fastpref.sequence_logprobs(logits, labels)) - 0.01 * tokens.mean()


class Hidden(Step):
    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        tokens = fastpref.linear_token_logprobs(hidden, self.head.weight, labels, self.head.bias)
        return of_pairs(tokens.sum(-1)) - 0.01 * tokens.mean()


class HiddenLoss(Step):
    """In one chunk, with the gradients made in the backward, and in several, with them made in the forward."""

    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        options: dict[str, Any] = {"bias": self.head.bias, "reference_free": True}
        whole = fastpref.linear_dpo_loss(hidden, self.head.weight, labels, **options).loss
        return whole + fastpref.linear_dpo_loss(hidden, self.head.weight, labels, chunk_rows=24, **options).loss


class Losses(Step):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)

    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        tokens, mask = -hidden[:, 1:].square().sum(-1), labels[:, 1:] != -100
        logps, old = tokens.sum(-1), labels[:, 1:].cos().to(tokens.dtype) - 5
        (chosen, rejected), ref = logps.chunk(2), old.sum(-1).chunk(2)[0]
        return (
            fastpref.dpo_loss(chosen, rejected, ref, ref, loss_type=["sigmoid", "ipo"]).loss
            + fastpref.kto_loss(logps, old.sum(-1), mask[:, 2], kl=0.1).loss
            + fastpref.pairwise_reward_loss(chosen, rejected, center_weight=0.1)
            + fastpref.ranking_loss(tokens[:, :4], fastpref.ranks_from_scores(old[:, :4].cos()))
            + fastpref.ppo_policy_loss(tokens, old, old.cos(), mask).loss
        )


class Attached(Step):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, attn_implementation="eager",
        )  # fmt: skip
        self.model = fastpref.attach(transformers.LlamaForCausalLM(config), verify=False)

    def heads(self) -> nn.Module:
        return self.model

    @property
    def embed(self) -> nn.Module:
        return self.model.model.embed_tokens

    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        options = {"labels": labels, "fastpref": True, "reduction": "sum", "use_cache": False}
        return of_pairs(self.model(inputs_embeds=hidden, **options).logprobs)


COLUMNS: dict[str, type[Step]] = {
    "log-probs from logits": Logits,
    "log-probs from hidden states": Hidden,
    "losses from hidden states": HiddenLoss,
    "losses of log-probs": Losses,
    "`attach`ed models": Attached,
}
OURS = (Logits, Hidden, HiddenLoss)


def build(kind: type[Step]) -> Step:
    torch.manual_seed(0)
    step = kind()
    for parameter in step.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return step


def head_of(step: Step) -> tuple[nn.Module, str]:
    """The module that holds the head, and the head's name in it."""
    return step.heads(), "lm_head" if isinstance(step, Attached) else "head"


def batch(pairs: int = 2, length: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (2 * pairs, length), generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    return ids, labels


def outcome(step: Step, call: Callable[..., Tensor] | None = None, data: tuple[Tensor, ...] | None = None) -> Any:
    """The loss of a step and the gradients of all its parameters; of `call`, if what is run differs from it."""
    step.zero_grad()
    loss = (step if call is None else call)(*(batch() if data is None else data))
    loss.backward()
    return {"loss": loss.detach(), **gradients(step)}


def gradients(step: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in step.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(step.parameters()))
    assert all(gradient.abs().max() > 1e-5 for gradient in found.values())
    return found


def hold(found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def values(step: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in step.named_parameters()}


def inductor(kind: type[Step]) -> None:
    found, wanted = _by_inductor()
    name = OURS.index(kind)
    for key in wanted:
        if key == "loss" or key.startswith(f"{name}."):
            hold(found[key], wanted[key], rtol=1e-4, atol=1e-5)


@functools.cache
def _by_inductor() -> tuple[Any, Any]:
    """The steps of our own functions as one graph: what the compiler takes to start is the most of what it takes."""
    steps = nn.ModuleList(map(build, OURS))

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([step(ids, labels) for step in steps]).sum()

    torch.compiler.reset()
    runs: Any = (call, torch.compile(call, fullgraph=True))
    found, wanted = (outcome(steps, run) for run in reversed(runs))  # type: ignore[arg-type]
    return found, wanted


def dynamic(kind: type[Step]) -> None:
    step = build(kind)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    hold(outcome(step, compiled), outcome(step))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (10, 12):
            data = batch(length=length, seed=2)
            hold(outcome(step, compiled, data), outcome(step, data=data))


def compiled_backward(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)
    torch.compiler.reset()

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        loss = step(ids, labels)
        loss.backward()
        return loss

    step.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        loss = torch.compile(call, backend="aot_eager")(*batch())
    hold({"loss": loss.detach(), **gradients(step)}, wanted)


def functional(kind: type[Step]) -> None:
    step, other = build(kind), build(kind)
    leaves = {name: value.requires_grad_() for name, value in values(step).items()}
    for parameter in other.parameters():
        parameter.data.zero_()
    loss = functional_call(other, leaves, batch())
    loss.backward()
    hold({"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}, outcome(step))


def func_grad(kind: type[Step]) -> None:
    step = build(kind)
    by_values = torch.func.grad_and_value(lambda given: functional_call(step, given, batch()))
    found, loss = by_values(values(step))
    hold({"loss": loss, **found}, outcome(step))


def func_grad_compiled(kind: type[Step]) -> None:
    step, data = build(kind), batch()
    wanted = outcome(step)
    torch.compiler.reset()

    def call(given: dict[str, Tensor]) -> Any:
        return torch.func.grad_and_value(lambda given: functional_call(step, given, data))(given)

    found, loss = torch.compile(call, fullgraph=True, backend="eager")(values(step))
    hold({"loss": loss, **found}, wanted)


def vmap(kind: type[Step]) -> None:
    """Gradients of each part of a batch."""
    step, parts = build(kind), [batch(seed=seed) for seed in (1, 2)]
    one = torch.func.grad(lambda given, ids, labels: functional_call(step, given, (ids, labels)))
    ids, labels = (torch.stack(part) for part in zip(*parts, strict=True))
    found = torch.vmap(one, in_dims=(None, 0, 0))(values(step), ids, labels)
    for number, data in enumerate(parts):
        wanted = outcome(step, data=data)
        hold({name: gradient[number] for name, gradient in found.items()}, {k: wanted[k] for k in found})


def forward_mode(kind: type[Step]) -> None:
    step, (_, labels) = build(kind), batch()
    hidden, along = torch.randn(2, 4, 9, WIDTH).unbind()
    leaf = hidden.clone().requires_grad_()
    wanted = (torch.autograd.grad(step.score(leaf, labels), leaf)[0] * along).sum()
    with forward_ad.dual_level():
        dual = step.score(forward_ad.make_dual(hidden, along), labels)
        hold(forward_ad.unpack_dual(dual).tangent, wanted)
    hold(torch.func.jvp(lambda hidden: step.score(hidden, labels), (hidden,), (along,))[1], wanted)


def double_backward(kind: type[Step]) -> None:
    step = build(kind).double()
    parameters = list(step.parameters())

    def penalty() -> Tensor:
        found = torch.autograd.grad(step(*batch()), parameters, create_graph=True)
        return sum((gradient.square().sum() for gradient in found), torch.zeros(()))

    (slope,) = torch.autograd.grad(penalty(), step.embed.weight)
    along = torch.randn_like(slope)
    either = []
    for distance in (1e-5, -1e-5):
        step.embed.weight.data.add_(distance * along)
        either.append(penalty())
        step.embed.weight.data.sub_(distance * along)
    hold((slope * along).sum(), (either[0] - either[1]) / 2e-5, rtol=1e-4)


def retain_graph(kind: type[Step]) -> None:
    step = build(kind)
    loss, parameters = step(*batch()), list(step.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, parameters)
    for results in zip(first, second, kept, strict=True):
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])


def accumulation(kind: type[Step]) -> None:
    step, data = build(kind), batch(pairs=4)
    wanted = outcome(step, data=data)
    step.zero_grad()
    for half in range(2):
        (step(*(torch.cat([part.chunk(2)[half] for part in rows.chunk(2)]) for rows in data)) / 2).backward()
    hold(gradients(step), {name: value for name, value in wanted.items() if name != "loss"})


def no_gradients(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)["loss"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = step(*batch())
            assert not loss.requires_grad
            hold(loss.clone(), wanted)


def step_in_backward(kind: type[Step]) -> None:
    """An optimizer's step in the hook of each parameter, under anomaly detection."""
    step = build(kind)
    before, wanted = values(step), outcome(step)

    def descend(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.sub_(parameter.grad)
        parameter.grad = None

    for parameter in step.parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(descend)
    with torch.autograd.detect_anomaly(check_nan=True):
        step(*batch()).backward()
    hold(values(step), {name: value - wanted[name] for name, value in before.items()})


def checkpointed(kind: type[Step], **options: Any) -> None:
    step = build(kind)
    wanted, scored = outcome(step), []

    def score(hidden: Tensor, labels: Tensor) -> Tensor:
        scored.append(torch.is_grad_enabled())
        return step.score(hidden, labels)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        loss = checkpoint(score, torch.tanh(step.embed(ids)), labels, **options)
        assert isinstance(loss, Tensor)
        return loss

    hold(outcome(step, call), wanted)
    assert len(scored) == 2


def checkpoint_selective(kind: type[Step]) -> None:
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpointed(kind, use_reentrant=False, context_fn=contexts)


def offloading(kind: type[Step]) -> None:
    step, packed = build(kind), []

    def pack(tensor: Tensor) -> bytes:
        packed.append(tensor)
        return pickle.dumps(tensor.detach())

    wanted = outcome(step)
    with torch.autograd.graph.saved_tensors_hooks(pack, pickle.loads):
        hold(outcome(step), wanted)
    assert packed
    with torch.autograd.graph.save_on_cpu():
        hold(outcome(step), wanted)


def autocast(kind: type[Step], dtype: torch.dtype) -> None:
    step = build(kind)
    wanted = outcome(step)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            loss = step(ids, labels)
        assert loss.dtype == torch.float32
        return loss

    for name, value in outcome(step, call).items():
        assert value.dtype == torch.float32
        assert (value - wanted[name]).abs().max() <= 8 * torch.finfo(dtype).eps * wanted[name].abs().max()


def grad_scaler(kind: type[Step]) -> None:
    """A loss whose gradients fp16 cannot hold unscaled, and a scale too large, whose step is skipped."""
    step = build(kind)
    before, wanted = values(step), outcome(step)
    optimizer = torch.optim.SGD(step.parameters(), lr=1e6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    for factor, finite in ((1e6, False), (1e-6, True)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = factor * step(*batch())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        if finite:
            found = values(step)
            for name, value in before.items():
                allowed = 8 * torch.finfo(torch.float16).eps * wanted[name].abs().max() + 1e-6
                assert (found[name] - (value - wanted[name])).abs().max() <= allowed
        else:
            hold(values(step), before, rtol=0.0, atol=0.0)
            scaler.update()
            assert scaler.get_scale() == 2.0**126
            scaler.update(2.0**20)


def deterministic(kind: type[Step]) -> None:
    step = build(kind)
    torch.use_deterministic_algorithms(True)
    hold(outcome(step), outcome(step), rtol=0.0, atol=0.0)


def copies(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        for parameter in step.parameters():
            parameter.data.mul_(1.1)
        hold(outcome(other), wanted, rtol=0.0, atol=0.0)


def results(kind: type[Step]) -> None:
    (ids, labels), step = batch(), build(kind)
    hidden, weight = torch.randn(4, 9, WIDTH), torch.randn(VOCABULARY, WIDTH)
    stats: dict[str, Any] = {"stats": ("lse", "entropy")}
    made: dict[type[Step], Callable[[], list[Any]]] = {
        Logits: lambda: [fastpref.token_logprobs(hidden @ weight.T, labels, **stats)],
        Hidden: lambda: [fastpref.linear_sequence_logprobs(hidden, weight, labels, **stats)],
        HiddenLoss: lambda: [
            fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True),
            fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True, **stats),
            fastpref.linear_preference_loss(hidden, weight, labels, lambda x: x.sum(-1), group_size=2, **stats),
        ],
        Losses: lambda: [fastpref.dpo_loss(*hidden[:2, :, 0], reference_free=True)],
        Attached: lambda: [step.heads()(ids, labels=labels, fastpref=True, use_cache=False)],
    }
    with torch.no_grad():
        for result in made[kind]():
            again = pickle.loads(pickle.dumps(result))
            assert type(again) is type(result)
            hold([value for value in again if value is not None], [value for value in result if value is not None])


def replica(step: nn.Module, scale: float) -> Any:
    """A replica as DataParallel makes it, with weights of its own."""
    made = {module: module._replicate_for_data_parallel() for module in step.modules()}
    for module, other in made.items():
        for name, child in module._modules.items():
            other._modules[name] = None if child is None else made[child]
        for name, parameter in module._parameters.items():
            setattr(other, name, None if parameter is None else scale * parameter)
    return made[step]


def replicas(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)
    data = [batch(), batch(seed=2)]
    made = [replica(step, scale) for scale in (1.0, 1.3)]
    apart = [other(*given) for other, given in zip(made, data, strict=True)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda other, given: other(*given), made, data))
    hold(together, apart, rtol=0.0, atol=0.0)
    step.zero_grad()
    together[0].backward()
    hold(gradients(step), {name: value for name, value in wanted.items() if name != "loss"})


def threads(kind: type[Step]) -> None:
    steps, data, meet = (
        [build(kind), build(kind)],
        [batch(), batch(pairs=3, length=11)],
        threading.Barrier(2, timeout=600),
    )
    wanted = [outcome(step, data=given) for step, given in zip(steps, data, strict=True)]

    def work(number: int) -> None:
        for _ in range(10):
            meet.wait()
            hold(outcome(steps[number], data=data[number]), wanted[number], rtol=0.0, atol=0.0)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


class Outcomes(torch.utils.data.Dataset):
    """What a step gives in whoever reads this."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return outcome(self.step, data=batch(seed=index))


def forked_worker(kind: type[Step]) -> None:
    step = build(kind)
    here = [outcome(step, data=batch(seed=seed)) for seed in range(2)]
    there = torch.utils.data.DataLoader(
        Outcomes(step), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=600
    )
    hold(list(there), here)


def tied(kind: type[Step]) -> None:
    step = build(kind)
    module, name = head_of(step)
    head = getattr(module, name)
    head.weight = step.embed.weight
    found = outcome(step)["embed.weight" if kind is not Attached else "model.model.embed_tokens.weight"]
    untied = build(kind)
    module, name = head_of(untied)
    getattr(module, name).weight = nn.Parameter(untied.embed.weight.detach().clone())
    untied(*batch()).backward()
    hold(found, untied.embed.weight.grad + getattr(module, name).weight.grad)


def quantised(kind: type[Step]) -> None:
    """PyTorch's own int8, whose weight is no tensor."""
    step = build(kind)
    wanted = outcome(step)
    module, name = head_of(step)
    whole = nn.Sequential(getattr(module, name))
    setattr(module, name, torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, torch.qint8)[0])
    hold(step(*batch()).detach(), wanted["loss"], rtol=0.05)


def parametrised(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)
    module, name = head_of(step)
    head = torch.nn.utils.parametrizations.weight_norm(getattr(module, name))
    loss = step(*batch())
    loss.backward()
    hold(loss.detach(), wanted["loss"])
    weight = head.parametrizations.weight
    norm = weight.original1.norm(dim=1, keepdim=True)
    along = (wanted[f"{'model.' if kind is Attached else ''}{name}.weight"] * weight.original1 / norm).sum(1, True)
    hold(weight.original0.grad, along)


class Marked(Tensor):
    """A subclass that changes nothing, as `nn.Buffer` or a library's annotation."""


def subclass(kind: type[Step]) -> None:
    step = build(kind)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        return step.score(torch.tanh(step.embed(ids)).as_subclass(Marked), labels)

    wanted = outcome(step)
    found = outcome(step, call)
    assert isinstance(found["loss"], Marked)
    hold({name: value.as_subclass(Tensor) for name, value in found.items()}, wanted)


def wrapper_subclass(kind: type[Step]) -> None:
    """Weights that are two tensors each, of which every operator is run twice."""
    step, scaled = build(kind), build(kind)
    for one, other in zip(step.modules(), scaled.modules(), strict=True):
        for name, parameter in list(one._parameters.items()):
            if parameter is not None:
                other._parameters[name].data.mul_(1.1)
                one._parameters[name] = nn.Parameter(TwoTensor(parameter.detach(), 1.1 * parameter.detach()))
    found = outcome(step)
    hold({name: value.a for name, value in found.items()}, outcome(build(kind)))
    hold({name: value.b for name, value in found.items()}, outcome(scaled))


def nested(kind: type[Step]) -> None:
    step, lengths = build(kind), (5, 9, 6, 7)
    rows = [torch.randn(length, WIDTH) for length in lengths]
    hidden = torch.nested.nested_tensor(rows, layout=torch.jagged)
    labels = torch.nested.nested_tensor_from_jagged(torch.randint(VOCABULARY, (sum(lengths),)), hidden.offsets())
    step.score(hidden, labels)


def exported(kind: type[Step], gradients: bool) -> None:
    step, data = build(kind), batch(pairs=3, length=12)
    rows, length = 2 * torch.export.Dim("pairs", min=2, max=32), torch.export.Dim("length", min=9, max=12)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(step, batch(), dynamic_shapes=({0: rows, 1: length},) * 2).module()
    wanted = outcome(step, data=data)
    if gradients:
        hold(outcome(program, data=data), wanted)  # type: ignore[arg-type]
    else:
        with torch.no_grad():
            hold(program(*data), wanted["loss"])


def shapes_only(kind: type[Step], fake: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("meta"):
        step, labels = build(kind), torch.zeros(4, 9, dtype=torch.long)
        step(labels, labels).backward()
    for parameter in step.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert isinstance(parameter.grad, FakeTensor) if fake else parameter.grad.is_meta


def flops(kind: type[Step]) -> None:
    step = build(kind)
    with FlopCounterMode(display=False) as counter:
        outcome(step)
    head = 2 * 4 * 9 * WIDTH * VOCABULARY
    assert counter.get_total_flops() >= 3 * head, "the head's products are not counted"


def defined(place: str) -> bool:
    """Whether a file of this repository, `path::name`, has a function of that name."""
    path, name = place.split("::")
    tree = ast.parse((ROOT / path).read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def elsewhere(*places: str) -> Callable[[type[Step]], None]:
    """What stands in for a check that this process cannot make: there are tests of these names."""

    def check(kind: type[Step]) -> None:
        assert all(map(defined, places))

    check.places = places  # type: ignore[attr-defined]
    return check


TWICE = "refused: once_differentiable"
UNRUN, HOST = "GPU test, not run yet", "with `scored_rows` (GPU test, not run yet)"
WRAPPED, VOCABULARIES = "tests/distributed/wrapped.py", "tests/distributed/vocabulary.py"
CUDA = "tests/gpu/test_cuda.py"


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        what: is done to a step.
        check: does it, and raises unless the result is right.
        cells: what comes of it, one of each column: "yes"; "refused: " and a part of the error's text; "no: " and a
            part of what the check says; "-" where there is nothing to try. One text is that of all columns.
    """

    what: str
    check: Callable[[type[Step]], None]
    cells: tuple[str, ...] | str = "yes"

    def verdicts(self) -> tuple[str, ...]:
        return (self.cells,) * len(COLUMNS) if isinstance(self.cells, str) else self.cells


def but(verdict: str, losses: str = "yes", attached: str | None = None) -> tuple[str, ...]:
    """One verdict for all but the losses of log-probs, which on a CPU are plain PyTorch, and may be attached models."""
    return (verdict, verdict, verdict, losses, verdict if attached is None else attached)


UNCOUNTED = "no: not counted"
VMAP, JVP = "refused: does not go under vmap", "refused: no forward-mode derivative"
EXPORT = "refused: export under torch.no_grad()"

SECTIONS: dict[str, list[Row]] = {
    "Compiling": [
        Row(
            "`torch.compile(fullgraph=True)` by inductor, forward and backward",
            inductor,
            but("yes", losses="-", attached="-"),
        ),
        Row("`torch.compile(fullgraph=True, dynamic=True)`, once for all lengths", dynamic),
        Row("compiled autograd", compiled_backward, but("yes", losses="-", attached="-")),
        Row("`torch.export` under `no_grad`, with dynamic shapes", functools.partial(exported, gradients=False)),
        Row("`torch.export` of what requires gradients", functools.partial(exported, gradients=True), but(EXPORT)),
        Row("fake tensors, forward and backward", functools.partial(shapes_only, fake=True)),
        Row(
            "meta tensors, forward and backward",
            functools.partial(shapes_only, fake=False),
            but("yes", attached="refused: cannot be called on meta tensors"),
        ),
    ],
    "Autograd": [
        Row("`retain_graph=True` and a second backward", retain_graph),
        Row("double backward", double_backward, but(TWICE)),
        Row("gradients accumulated over halves of a batch", accumulation),
        Row("`torch.no_grad()`, `torch.inference_mode()`", no_gradients),
        Row("an optimizer in the backward's hooks, `detect_anomaly`", step_in_backward),
        Row("`torch.func.functional_call`", functional),
        Row("`torch.func.grad`, `vjp`", func_grad),
        Row("`torch.func.grad` in `torch.compile`", func_grad_compiled),
        Row("`torch.vmap`, also of gradients", vmap, but(VMAP)),
        Row("forward mode: `torch.func.jvp`, `forward_ad`", forward_mode, but(JVP)),
    ],
    "Memory": [
        Row("checkpointing, `use_reentrant=False`", functools.partial(checkpointed, use_reentrant=False)),
        Row("checkpointing, `use_reentrant=True`", functools.partial(checkpointed, use_reentrant=True)),
        Row("selective checkpointing that keeps PyTorch's products", checkpoint_selective),
        Row("`save_on_cpu`, and other hooks of saved tensors", offloading),
    ],
    "Precision": [
        Row("autocast to bf16", functools.partial(autocast, dtype=torch.bfloat16)),
        Row("autocast to fp16", functools.partial(autocast, dtype=torch.float16)),
        Row("`GradScaler`, a skipped step included", grad_scaler),
        Row("`torch.use_deterministic_algorithms(True)`", deterministic),
    ],
    "Processes and threads": [
        Row("`copy.deepcopy` and `pickle` of a model", copies),
        Row("`pickle` of what a call returns", results),
        Row("replicas in threads, as `DataParallel`'s", replicas),
        Row("two threads at once, forward and backward", threads),
        Row("a forked worker of a `DataLoader`", forked_worker),
        Row("DDP", elsewhere(f"{WRAPPED}::ddp"), ("-", "yes", "yes", "yes", "yes")),
        Row(
            "FSDP2", elsewhere(f"{WRAPPED}::fsdp2", f"{WRAPPED}::fsdp2_accumulates"), ("-", "yes", "yes", "yes", "yes")
        ),
        Row(
            "a vocabulary split over ranks, as tensor parallelism's",
            elsewhere(
                *(f"{VOCABULARIES}::{name}" for name in ("token_logprobs", "linear_token_logprobs", "linear_dpo_loss"))
            ),
            ("yes", "yes", "yes", "-", "-"),
        ),
        Row("context parallelism", elsewhere(f"{WRAPPED}::context_parallel"), ("yes", "yes", "-", "-", "-")),
    ],
    "Heads and tensors": [
        Row("a head tied to the embedding", tied, ("yes", "yes", "yes", "-", "yes")),
        Row(
            "`weight_norm` on the head", parametrised, ("yes", "yes", "yes", "-", "refused: must be a plain nn.Linear")
        ),
        Row(
            "a head of PyTorch's dynamic int8",
            quantised,
            (
                "yes",
                *["refused: weight must be a floating-point tensor"] * 2,
                "-",
                "refused: must be a plain nn.Linear",
            ),
        ),
        Row("a plain subclass of `Tensor`", subclass),
        Row(
            "weights of a wrapper subclass (`__torch_dispatch__`)",
            wrapper_subclass,
            ("yes", "yes", "yes", "yes", "refused: must be a plain tensor"),
        ),
        Row("nested tensors (jagged)", nested, (*["refused: must be no nested tensor"] * 3, "-", "-")),
    ],
    "CUDA": [
        Row(
            "a CUDA graph, captured and replayed",
            elsewhere(
                f"{CUDA}::test_captured_in_a_graph",
                f"{CUDA}::test_a_loss_waits_for_nothing_and_is_captured",
                f"{CUDA}::test_scored_rows_are_counted_by_the_host",
                f"{CUDA}::test_told_its_scored_rows_a_step_waits_for_nothing_and_is_captured",
            ),
            (UNRUN, HOST, HOST, UNRUN, HOST),
        ),
        Row(
            '`torch.compile(mode="reduce-overhead")`, which captures what it can',
            elsewhere(f"{CUDA}::test_compiles_with_graphs"),
            (UNRUN, UNRUN, UNRUN, UNRUN, "-"),
        ),
    ],
    "Counting": [Row("`FlopCounterMode` counts the head's products", flops, ("yes", UNCOUNTED, UNCOUNTED, "-", "-"))],
}
CELLS = [
    pytest.param(row, kind, verdict, id=f"{row.what} | {column}")
    for rows in SECTIONS.values()
    for row in rows
    for (column, kind), verdict in zip(COLUMNS.items(), row.verdicts(), strict=True)
    if verdict != "-"
]


def skip_without_compiled_torch_func() -> None:
    """torch 2.8 cannot trace it, 2.11 can, and nothing between the two was tried."""
    if torch.__version__ < (2, 11):
        pytest.skip(f"torch {torch.__version__} is not known to trace torch.func.grad")


@pytest.mark.parametrize(("row", "kind", "verdict"), CELLS)
def test_cell(row: Row, kind: type[Step], verdict: str) -> None:
    if row.check is func_grad_compiled:
        skip_without_compiled_torch_func()
    if row.check in (dynamic, func_grad_compiled) and kind is Attached and torch.__version__ < (2, 12):
        pytest.skip(f"torch {torch.__version__} breaks the graph of an attached model")
    outcome, _, phrase = verdict.partition(": ")
    if hasattr(row.check, "places") or outcome == "yes":
        row.check(kind)
    else:
        error = AssertionError if outcome == "no" else (RuntimeError, TypeError, ValueError, pickle.PicklingError)
        with pytest.raises(error, match=re.escape(phrase)):
            row.check(kind)


class HostReads(TorchDispatchMode):
    """Counts the calls that make the host wait for values, which on a GPU is a synchronisation."""

    WAITING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.number += function.overloadpacket in self.WAITING or by_mask
        return function(*args, **(kwargs or {}))


def test_operators_that_wait_for_the_host_are_run_between_cuda_graphs() -> None:
    """Where this PyTorch can be told so, the compiler leaves them out of the graphs that it captures."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this PyTorch has no such tag")
    # What runs on every device; the rest are kernels of their own on a GPU, and tests/gpu looks for waits there.
    backend = linear.library_backend(linear.fold, linear.fold_backward)
    hidden, weight, labels = torch.randn(2, 4, 6), torch.randn(9, 6), torch.randint(9, (2, 4))
    scoring, chunking, shard = (-100, True, 1.0, 1.0, None), (None, None, None), torch.tensor([0, 9])
    given = (hidden, weight, None, labels, None, None, *scoring, 0, *chunking)
    logps, norm, shares, *_ = linear.logprobs(backend, *given)
    sums, masses = linear.fold_shard(backend, *given)
    back = (logps, None, hidden, weight, None, labels, None, norm, None, shares)
    totals, dtypes = (torch.zeros_like(hidden), torch.zeros_like(weight), None), (torch.float32,) * 3
    calls: dict[str, Callable[[], Any]] = {
        "linear_logprobs": lambda: linear.logprobs(backend, *given),
        "linear_fold": lambda: linear.fold_shard(backend, *given),
        "linear_finalize": lambda: linear.finalize_shard(
            backend, hidden, labels, None, shard, sums, sums, masses, None, *scoring, 0, None, None
        ),
        "shard_labels": lambda: linear.shard_labels(labels, None, shard, 9, -100, True, True),
        "linear_logprobs_backward": lambda: linear.gradients(
            backend, *back, [True, True, False], *dtypes, *scoring, *chunking
        ),
        "linear_logprobs_backward_": lambda: linear.accumulate_gradients(
            backend, *back, *totals, False, *scoring, *chunking
        ),
        "scaled_gradient": lambda: linear.scaled_gradient(backend, hidden, torch.tensor(2.0), torch.bfloat16),
    }
    waiting = set()
    for name, call in calls.items():
        with HostReads() as reads:
            call()
        if reads.number:
            waiting.add(name)
    schemas = {name.partition("(")[0] for name in ops._SCHEMAS}
    assert calls.keys() == {name for name in schemas if name.startswith(("linear", "shard", "scaled"))}
    tagged = {name for name in schemas if tag in getattr(torch.ops.fastpref, name).default.tags}
    assert tagged == waiting


def test_what_a_nested_tensor_is_refused_for_works() -> None:
    rows = [torch.randn(length, VOCABULARY) for length in (5, 9)]
    logits = torch.nested.nested_tensor(rows, layout=torch.jagged)
    labels = torch.randint(VOCABULARY, (14,))
    found = fastpref.sequence_logprobs(logits.values(), labels, cu_seqlens=logits.offsets())
    hold(
        found,
        torch.stack(
            [
                fastpref.sequence_logprobs(row[None], y[None])[0]
                for row, y in zip(rows, labels.split([5, 9]), strict=True)
            ]
        ),
    )


def test_the_reference_has_the_derivatives_that_are_refused() -> None:
    labels, (logits, along) = torch.randint(VOCABULARY, (2, 5)), torch.randn(2, 2, 5, VOCABULARY).unbind()
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fastpref.token_logprobs(leaf, labels).sum(), leaf)
    _, tangent = torch.func.jvp(lambda z: fastpref.reference.token_logprobs(z, labels), (logits,), (along,))
    hold(tangent.sum(), (gradient * along).sum(), atol=1e-5)
    (gradient,) = torch.autograd.grad(fastpref.reference.token_logprobs(leaf, labels).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    assert second.abs().max() > 1e-3


def test_compiled_torch_func_by_the_logits_themselves() -> None:
    """In a graph these do not say that they require a gradient: without a mend it would be 0."""
    skip_without_compiled_torch_func()
    logits, labels = torch.randn(2, 5, VOCABULARY), torch.randint(VOCABULARY, (2, 5))
    torch.compiler.reset()
    by_logits = torch.func.grad(lambda z: fastpref.token_logprobs(z, labels).square().sum())
    hold(torch.compile(by_logits, fullgraph=True, backend="eager")(logits), by_logits(logits))
