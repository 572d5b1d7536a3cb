"""Every module of `fastpref.nn` against its function, and under the calls that OpenRLHF and torchtune make.

The stubs of their trainers repeat call and unpacking as they stand in OpenRLHF 0.11.2 (trainer/dpo_trainer.py,
trainer/rm_trainer.py, trainer/ray/ppo_actor.py, trainer/ray/ppo_critic.py) and 0.9.5 (trainer/kto_trainer.py), in
torchtune 0.6.1 (recipes/full_dpo_distributed.py) and in its main branch at bd2a0fc (the same recipe).
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from fastpref import losses, nn
from fastpref.losses import TABLE, Loss
from tests.helpers.dpo import required
from tests.helpers.losses import fields

Arguments = tuple[tuple[Tensor, ...], dict[str, Any]]
every_loss = pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)
MODULES = [getattr(nn, name) for name in nn.__all__]
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


def module_of(function_name: str) -> Any:
    """Return the module of a loss. Its name is the function's without underscores."""
    return {name.lower(): getattr(nn, name) for name in nn.__all__}[function_name.replace("_", "")]


def function_of(module: Any) -> Any:
    (name,) = (name for name in losses.__all__ if name.replace("_", "") == module.__name__.lower() and name.islower())
    return getattr(losses, name)


def split(module: Any, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keywords of a function that its module's constructor takes, and those that the call takes."""
    fixed = inspect.signature(module).parameters
    constructor = {k: v for k, v in options.items() if k in fixed and not isinstance(v, Tensor)}
    return constructor, {k: v for k, v in options.items() if k not in constructor}


def tokens(*shape: int, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*shape) for _ in range(count))


def call_of(module: Any) -> tuple[Tensor, ...]:
    """Return the positional arguments of a typical call."""
    if module in (nn.PPOPolicyLoss, nn.PPOValueLoss):
        return (*tokens(3, 5, count=3), torch.rand(3, 5) < 0.7)
    if module is nn.KTOSplitLoss:
        return (*(torch.randn(n) for n in (3, 2, 4)), *(torch.randn(n) for n in (3, 2, 4)))
    loss = next(loss for loss in TABLE if module_of(loss.function.__name__) is module)
    return loss.example(torch.Generator().manual_seed(0), 5)[0]


def call(loss_fn: Any) -> Any:
    torch.manual_seed(1)
    more = {"kl": 0.3} if type(loss_fn) is nn.KTOLoss else {}
    return loss_fn(*call_of(type(loss_fn)), **more)


class TestEveryLoss:
    @every_loss
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_is_its_function(self, loss: Loss, reduction: str) -> None:
        module = module_of(loss.function.__name__)
        tensors, options = loss.example(torch.Generator().manual_seed(7), 7)
        options = {**options, **loss.options, "reduction": reduction}
        constructor, at_call = split(module, options)
        results = []
        for function, keywords in ((module(**constructor), at_call), (loss.function, options)):
            leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
            result = function(*leaves, **keywords)
            fields(result)[0].sum().backward()
            results.append((result, [t.grad for t in leaves if t.grad is not None]))
        (got, slopes), (wanted, wanted_slopes) = results
        assert type(got) is type(wanted)
        assert len(slopes) == len(wanted_slopes) > 0
        for a, b in zip((*fields(got), *slopes), (*fields(wanted), *wanted_slopes), strict=True):
            assert torch.equal(a, b)

    @every_loss
    def test_takes_every_option_of_its_function(self, loss: Loss) -> None:
        module = module_of(loss.function.__name__)
        fixed, at_call = inspect.signature(module).parameters, inspect.signature(module.forward).parameters
        for name, parameter in inspect.signature(loss.function).parameters.items():
            assert name in fixed or name in at_call, name
            if name in fixed:
                assert fixed[name].default == parameter.default, name


class TestEveryModule:
    @every_module
    def test_names_and_defaults_are_the_functions(self, module: Any) -> None:
        if module is nn.KTOSplitLoss:
            assert inspect.signature(module) == inspect.signature(nn.KTOLoss)
            return
        wanted = inspect.signature(function_of(module)).parameters
        for name, parameter in inspect.signature(module).parameters.items():
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            assert parameter.default == wanted[name].default, name
        tensors = [name for name, p in wanted.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        forward = list(inspect.signature(module.forward).parameters)[1 : len(tensors) + 1]
        assert [name.removeprefix("action_") for name in forward] == tensors

    @every_module
    def test_has_no_state(self, module: Any) -> None:
        loss_fn = module()
        call(loss_fn)
        assert not list(loss_fn.parameters())
        assert not list(loss_fn.buffers())
        assert not loss_fn.state_dict()

    @every_module
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
    def test_copies(self, module: Any, copied: Any) -> None:
        option = {"clip": 0.01} if "clip" in inspect.signature(module).parameters else {"reduction": "sum"}
        loss_fn = module(**option)
        other = copied(loss_fn)
        assert repr(other) == repr(loss_fn)
        assert all(torch.equal(a, b) for a, b in zip(fields(call(other)), fields(call(loss_fn)), strict=True))

    @every_module
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self, module: Any) -> None:
        torch.compiler.reset()
        loss_fn = module()
        arguments, more = call_of(module), {"kl": 0.3} if module is nn.KTOLoss else {}
        compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
        for got, wanted in zip(fields(compiled(*arguments, **more)), fields(loss_fn(*arguments, **more)), strict=True):
            torch.testing.assert_close(got, wanted)

    @every_module
    def test_is_documented(self, module: Any) -> None:
        for thing, sections in ((module, ("Args:", "Raises:")), (module.forward, ("Args:", "Returns:", "Raises:"))):
            text = inspect.getdoc(thing) or ""
            assert all(section in text for section in sections)
            for name in inspect.signature(thing).parameters:
                assert name == "self" or f"    {name}: " in text, f"{thing}: {name}"

    def test_exported(self) -> None:
        assert fastpref.nn is nn
        assert "nn" in fastpref.__all__


class TestConstruction:
    @pytest.mark.parametrize(
        ("module", "options"),
        [
            (nn.DPOLoss, {"beta": 0.0}),
            (nn.DPOLoss, {"beta": math.nan}),
            (nn.DPOLoss, {"loss_type": "dpo"}),
            (nn.DPOLoss, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}),
            (nn.DPOLoss, {"label_smoothing": 1.1}),
            (nn.DPOLoss, {"label_smoothing": 0.1, "loss_type": "ipo"}),
            (nn.DPOLoss, {"margin": math.inf}),
            (nn.DPOLoss, {"margin": 1.0, "loss_type": "ipo"}),
            (nn.DPOLoss, {"sft_weight": -1.0}),
            (nn.DPOLoss, {"reduction": "batchmean"}),
            (nn.KTOLoss, {"beta": -1.0}),
            (nn.KTOLoss, {"undesirable_weight": -1.0}),
            (nn.PairwiseRewardLoss, {"center_weight": -1.0}),
            (nn.BestOfKLoss, {"reduction": "batchmean"}),
            (nn.RankingLoss, {"reduction": "batchmean"}),
            (nn.PlackettLuceLoss, {"reduction": "batchmean"}),
            (nn.PPOPolicyLoss, {"clip": 0.0}),
            (nn.PPOPolicyLoss, {"reduction": "mean"}),
            (nn.PPOValueLoss, {"clip": -0.2}),
        ],
    )
    def test_refuses_as_its_function_does(self, module: Any, options: dict[str, Any]) -> None:
        more = {"kl": 0.0} if module is nn.KTOLoss else {}
        with pytest.raises(ValueError) as wanted:  # noqa: PT011 - whatever it says
            function_of(module)(*call_of(module), **more, **options)
        with pytest.raises(ValueError) as got:  # noqa: PT011
            module(**options)
        assert str(got.value) == str(wanted.value)

    @every_module
    def test_refuses_what_it_does_not_know(self, module: Any) -> None:
        with pytest.raises(TypeError, match=r"ipo"):
            module(ipo=True)

    @pytest.mark.parametrize("module", [nn.DPOLoss, nn.PairwiseRewardLoss], ids=lambda module: module.__name__)
    def test_refuses_a_tensor(self, module: Any) -> None:
        with pytest.raises(TypeError, match=r"margin must not be a tensor at construction.*shape \(4,\)"):
            module(margin=torch.ones(4))

    @every_module
    def test_repr_of_defaults_is_bare(self, module: Any) -> None:
        assert repr(module()) == f"{module.__name__}()"

    def test_repr_shows_what_differs(self) -> None:
        assert repr(nn.DPOLoss(beta=0.1, loss_type="ipo")) == "DPOLoss(loss_type='ipo')"
        assert repr(nn.KTOSplitLoss(beta=0.2)) == "KTOSplitLoss(beta=0.2)"
        assert repr(nn.PPOValueLoss(clip=1.0, reduction="sequence")) == "PPOValueLoss(clip=1.0, reduction='sequence')"

    @pytest.mark.parametrize("module", [nn.DPOLoss, nn.PairwiseRewardLoss], ids=lambda module: module.__name__)
    def test_margin_of_the_call_takes_the_constructors_place(self, module: Any) -> None:
        tensors, each = call_of(module), torch.rand(5, dtype=torch.float64)
        fixed, plain = module(margin=0.7), module()
        for given, wanted in ((None, 0.7), (each, each), (0.0, 0.0)):
            got = fields(fixed(*tensors, margin=given))[0]
            assert torch.equal(got, fields(plain(*tensors, margin=wanted))[0])
        assert fields(fixed(*tensors))[0] != fields(plain(*tensors))[0]

    def test_weights_of_the_call(self) -> None:
        tensors, weights = call_of(nn.DPOLoss), torch.rand(5, dtype=torch.float64)
        each = nn.DPOLoss(reduction="none")
        torch.testing.assert_close(each(*tensors, weights=weights).loss, weights * each(*tensors).loss)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


class TestOpenRLHF:
    def dpo_step(self, trainer: Any, chosen_logps: Tensor, rejected_logps: Tensor, ref: tuple[Tensor, Tensor]) -> Any:
        reference_chosen_logps, reference_rejected_logps = ref
        preference_loss, chosen_reward, reject_reward = trainer.loss_fn(
            chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps
        )
        loss = preference_loss + 0 * 0.0 + 0 * 0.0
        loss.backward()
        acc = (chosen_reward > reject_reward).float().mean().item()
        return loss.item() * chosen_reward.numel(), acc, chosen_reward.mean().item(), reject_reward.mean().item()

    def test_dpo(self) -> None:
        chosen, rejected, ref = leaf(6), leaf(6), (torch.randn(6), torch.randn(6))
        trainer = SimpleNamespace(loss_fn=nn.DPOLoss(beta=0.3, label_smoothing=0.1))
        total, acc, chosen_reward, reject_reward = self.dpo_step(trainer, chosen, rejected, ref)
        gap = 0.3 * ((chosen - rejected) - (ref[0] - ref[1])).detach()
        wanted = -0.9 * F.logsigmoid(gap) - 0.1 * F.logsigmoid(-gap)
        assert total == pytest.approx(wanted.sum().item(), rel=1e-6)
        assert acc == pytest.approx((gap > 0).float().mean().item())
        assert chosen_reward - reject_reward == pytest.approx(gap.mean().item(), abs=1e-6)
        assert chosen.grad is not None
        torch.testing.assert_close(rejected.grad, -chosen.grad)

    def test_ipo(self) -> None:
        chosen, rejected, ref = leaf(6), leaf(6), (torch.randn(6), torch.randn(6))
        total, *_ = self.dpo_step(SimpleNamespace(loss_fn=nn.DPOLoss(loss_type="ipo")), chosen, rejected, ref)
        gap = ((chosen - rejected) - (ref[0] - ref[1])).detach()
        assert total == pytest.approx(((gap - 5) ** 2).sum().item(), rel=1e-6)

    @pytest.mark.parametrize("extras", [None, [1, 2, 0], [0.5, 2.0, 0.0]], ids=["none", "int", "float"])
    def test_reward_model(self, extras: list[float] | None) -> None:
        trainer = SimpleNamespace(loss_fn=nn.PairwiseRewardLoss())
        chosen_reward, reject_reward = leaf(3), leaf(3)
        margin = None if extras is None else torch.tensor(extras)
        preference_loss = trainer.loss_fn(chosen_reward, reject_reward, margin)
        (preference_loss + 0 * 0.0).backward()
        gap = (chosen_reward - reject_reward).detach() - torch.tensor(extras or [0.0] * 3)
        assert preference_loss.item() == pytest.approx(-F.logsigmoid(gap).mean().item(), rel=1e-6)
        assert preference_loss.item() == pytest.approx(torch.log(1 + torch.exp(-gap)).mean().item(), rel=1e-6)
        torch.testing.assert_close(chosen_reward.grad, -torch.sigmoid(-gap) / 3)

    @staticmethod
    def actor_step(trainer: Any, experience: Any, action_log_probs: Tensor, **loss_batch_info: Any) -> Tensor:
        actor_loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = trainer.actor_loss_fn(
            action_log_probs,
            experience.action_log_probs,
            experience.advantages,
            action_mask=experience.action_mask,
            rollout_log_probs=experience.rollout_log_probs,
            **loss_batch_info,
        )
        experience.info["ppo_clip_ratio"] = clip_ratio.detach()
        experience.info["ppo_kl"] = ppo_kl.detach()
        if vllm_kl is not None:
            experience.info["vllm_kl"] = vllm_kl.detach()
            experience.info["is_filter_ratio"] = is_filter_ratio.detach()
        return actor_loss

    @staticmethod
    def critic_step(trainer: Any, experience: Any, values: Tensor, **loss_batch_info: Any) -> Tensor:
        critic_loss = trainer.critic_loss_fn(
            values,
            experience.values,
            experience.returns,
            action_mask=experience.action_mask,
            **loss_batch_info,
        )
        return critic_loss + 0 * 0.0

    @staticmethod
    def experience(batch: int, length: int) -> Any:
        old, advantages, values, returns, rollout = tokens(batch, length, count=5)
        # Integers, as the mask of a sampled sequence is made from its attention mask.
        mask = (torch.rand(batch, length) < 0.6).long()
        return SimpleNamespace(
            action_log_probs=old,
            advantages=advantages,
            values=values,
            returns=returns,
            rollout_log_probs=rollout,
            action_mask=mask,
            info={},
        )

    @staticmethod
    def part(experience: Any, rows: slice) -> Any:
        tensors = {k: v[rows] for k, v in vars(experience).items() if isinstance(v, Tensor)}
        return SimpleNamespace(**tensors, info={})

    @pytest.mark.parametrize("reduction", ["token", "sequence"])
    def test_ppo_over_parts_of_a_step(self, reduction: str) -> None:
        """Two ranks, two micro-batches each, divisors of the whole step: what DeepSpeed averages is the step's loss."""
        whole, ranks, accumulated = self.experience(8, 5), 2, 2
        whole.action_mask[2] = 0
        logps, values = whole.action_log_probs + 0.3 * torch.randn(8, 5), whole.values + 0.3 * torch.randn(8, 5)
        trainer = SimpleNamespace(
            actor_loss_fn=nn.PPOPolicyLoss(clip=0.1, reduction=reduction),
            critic_loss_fn=nn.PPOValueLoss(clip=0.1, reduction=reduction),
        )
        info = {
            "dp_size": ranks,
            "batch_num_tokens": whole.action_mask.sum().float() / accumulated,
            "global_batch_size": (whole.action_mask.sum(-1) > 0).sum().float() / accumulated,
        }
        mask = whole.action_mask.bool()
        policy = losses.ppo_policy_loss(
            logps, whole.action_log_probs, whole.advantages, mask, clip=0.1, reduction=reduction
        )
        value = losses.ppo_value_loss(values, whole.values, whole.returns, mask, clip=0.1, reduction=reduction)
        for step, of, wanted in ((self.actor_step, logps, policy.loss), (self.critic_step, values, value.loss)):
            assert step(trainer, whole, of).item() == pytest.approx(wanted.item(), rel=1e-5)
            parts = [slice(i, i + 2) for i in range(0, 8, 2)]
            each = [step(trainer, self.part(whole, rows), of[rows], **info) for rows in parts]
            assert torch.stack(each).sum().item() / accumulated / ranks == pytest.approx(wanted.item(), rel=1e-5)

    def test_ppo_reports_are_of_the_batch_at_hand(self) -> None:
        experience = self.experience(4, 5)
        logps = experience.action_log_probs + 0.5 * torch.randn(4, 5)
        mask = experience.action_mask.bool()
        wanted = losses.ppo_policy_loss(logps, experience.action_log_probs, experience.advantages, mask, clip=0.1)
        for reduction in ("token", "sequence"):
            trainer = SimpleNamespace(actor_loss_fn=nn.PPOPolicyLoss(clip=0.1, reduction=reduction))
            self.actor_step(trainer, experience, logps, dp_size=3, batch_num_tokens=7.0, global_batch_size=2.0)
            assert experience.info == {"ppo_clip_ratio": wanted.clip_fraction, "ppo_kl": wanted.approx_kl}
        assert 0 < wanted.clip_fraction < 1

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
    def test_masks(self, dtype: torch.dtype) -> None:
        experience = self.experience(4, 5)
        experience.action_mask[:, -1] = 0
        logps, values = leaf(4, 5), leaf(4, 5)
        experience.action_mask = experience.action_mask.to(dtype)
        trainer = SimpleNamespace(actor_loss_fn=nn.PPOPolicyLoss(), critic_loss_fn=nn.PPOValueLoss())
        (self.actor_step(trainer, experience, logps) + self.critic_step(trainer, experience, values)).backward()
        for of in (logps, values):
            assert of.grad is not None
            assert not of.grad[experience.action_mask == 0].any()
            assert of.grad[experience.action_mask != 0].any()

    def test_no_mask_counts_all(self) -> None:
        old, advantages, logps = tokens(4, 5, count=3)
        everything = torch.ones(4, 5, dtype=torch.bool)
        assert torch.equal(
            nn.PPOPolicyLoss()(logps, old, advantages).loss, nn.PPOPolicyLoss()(logps, old, advantages, everything).loss
        )
        with pytest.raises(TypeError, match=r"mask must be a bool tensor.*list"):
            nn.PPOValueLoss()(logps, old, advantages, action_mask=[[True]])

    @staticmethod
    def kto_step(trainer: Any, policy_returns: tuple[Tensor, ...], ref_returns: tuple[Tensor, ...]) -> Any:
        kto_loss, chosen_rewards, rejected_rewards, KL = trainer.loss_fn(
            policy_returns[0],
            policy_returns[1],
            policy_returns[2],
            ref_returns[0],
            ref_returns[1],
            ref_returns[2],
        )
        (kto_loss + 0 * 0.0).backward()
        return kto_loss.item(), chosen_rewards, rejected_rewards, KL.item()

    @pytest.mark.parametrize(("desirable", "undesirable"), [(3, 2), (0, 4), (4, 0)])
    @pytest.mark.parametrize("kl", [0.8, -0.8])
    def test_kto(self, desirable: int, undesirable: int, kl: float) -> None:
        policy = (leaf(desirable), leaf(undesirable), torch.randn(5))
        ref = (torch.randn(desirable), torch.randn(undesirable), policy[2] - kl)
        trainer = SimpleNamespace(loss_fn=nn.KTOSplitLoss(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5))
        loss, chosen_rewards, rejected_rewards, KL = self.kto_step(trainer, policy, ref)
        z, up, down = max(kl, 0.0), (policy[0] - ref[0]).detach(), (policy[1] - ref[1]).detach()
        assert pytest.approx(z, abs=1e-6) == KL
        each = torch.cat((1.5 * (1 - torch.sigmoid(0.3 * (up - z))), 0.5 * (1 - torch.sigmoid(0.3 * (z - down)))))
        assert loss == pytest.approx(each.mean().item(), rel=1e-5)
        torch.testing.assert_close(chosen_rewards, 0.3 * up)
        torch.testing.assert_close(rejected_rewards, 0.3 * down)
        assert not chosen_rewards.requires_grad
        assert desirable == 0 or policy[0].grad.any()  # type: ignore[union-attr]
        assert undesirable == 0 or policy[1].grad.any()  # type: ignore[union-attr]

    def test_kto_averages_its_estimate_over_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def all_reduce(kl: Tensor) -> None:
            kl += 3.0 + 2.0  # two other ranks'

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        policy = (leaf(2), leaf(2), torch.randn(4))
        ref = (torch.randn(2), torch.randn(2), policy[2] - 1.0)
        *_, KL = self.kto_step(SimpleNamespace(loss_fn=nn.KTOSplitLoss()), policy, ref)
        assert pytest.approx(2.0, rel=1e-6) == KL

    def test_kto_refuses_misaligned_parts(self) -> None:
        a, b, kl = torch.randn(3), torch.randn(2), torch.randn(4)
        with pytest.raises(ValueError, match=r"ref_chosen_logps must .*\(3,\).*\(2,\)"):
            nn.KTOSplitLoss()(a, b, kl, b, a, kl)
        with pytest.raises(ValueError, match=r"ref_kl_logps must .*\(4,\).*\(3,\)"):
            nn.KTOSplitLoss()(a, b, kl, a, b, a)


def instantiate(config: dict[str, Any]) -> Any:
    """Return torchtune's component of a config's node: what a dotted path names, called with the other entries."""
    path, name = config["_component_"].rsplit(".", 1)
    return getattr(importlib.import_module(path), name)(**{k: v for k, v in config.items() if k != "_component_"})


@dataclass
class ChosenRejectedOutputs:
    """The class of that name in torchtune, at bd2a0fc."""

    chosen_logps: Tensor | None
    rejected_logps: Tensor | None
    chosen_logits: Tensor | None
    rejected_logits: Tensor | None


class TestTorchtune:
    ACCUMULATED = 4

    def consume(self, loss: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
        reward_accuracies = (chosen_rewards > rejected_rewards).float()
        loss = loss.mean()
        loss = loss / self.ACCUMULATED
        loss.backward()
        assert reward_accuracies.shape == chosen_rewards.shape
        return loss.detach()

    def four_tensors(self, recipe: Any, policy: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> Tensor:
        policy_chosen_log_probs, policy_rejected_log_probs = policy
        reference_chosen_log_probs, reference_rejected_log_probs = reference
        loss, chosen_rewards, rejected_rewards = recipe._loss_fn(
            policy_chosen_log_probs,
            policy_rejected_log_probs,
            reference_chosen_log_probs,
            reference_rejected_log_probs,
        )
        return self.consume(loss, chosen_rewards, rejected_rewards)

    def two_outputs(self, recipe: Any, policy: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> Tensor:
        policy_chosen_rejected_outputs = ChosenRejectedOutputs(*policy, torch.zeros(1), torch.zeros(1))
        del policy_chosen_rejected_outputs.chosen_logits
        del policy_chosen_rejected_outputs.rejected_logits
        reference_chosen_rejected_outputs = ChosenRejectedOutputs(None, None, None, None)
        if not recipe._loss_fn.is_reference_free:
            reference_chosen_rejected_outputs = ChosenRejectedOutputs(*reference, torch.zeros(1), torch.zeros(1))
            del (
                reference_chosen_rejected_outputs.chosen_logits,
                reference_chosen_rejected_outputs.rejected_logits,
            )
        loss, chosen_rewards, rejected_rewards = recipe._loss_fn(
            policy_chosen_rejected_outputs, reference_chosen_rejected_outputs
        )
        return self.consume(loss, chosen_rewards, rejected_rewards)

    @pytest.mark.parametrize("call", ["four_tensors", "two_outputs"])
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
    def test_dpo(self, call: str, reduction: str, loss_type: str) -> None:
        config = {"_component_": "fastpref.nn.DPOLoss", "beta": 0.3, "label_smoothing": 0, "loss_type": loss_type}
        recipe = SimpleNamespace(_loss_fn=instantiate({**config, "reduction": reduction}))
        policy, reference = (leaf(6), leaf(6)), (torch.randn(6), torch.randn(6))
        loss = getattr(self, call)(recipe, policy, reference)
        gap = 0.3 * ((policy[0] - policy[1]) - (reference[0] - reference[1])).detach()
        wanted = -F.logsigmoid(gap) if loss_type == "sigmoid" else torch.relu(1 - gap)
        torch.testing.assert_close(loss, wanted.mean() / self.ACCUMULATED)
        assert policy[0].grad is not None
        torch.testing.assert_close(policy[1].grad, -policy[0].grad)

    def test_without_a_reference(self) -> None:
        policy = (leaf(6), leaf(6))
        for loss_fn in (nn.DPOLoss(beta=0.3, loss_type="cpo"), nn.DPOLoss(beta=0.3, reference_free=True)):
            recipe = SimpleNamespace(_loss_fn=loss_fn)
            loss = self.two_outputs(recipe, policy, (torch.randn(6), torch.randn(6)))
            torch.testing.assert_close(
                loss, -F.logsigmoid(0.3 * (policy[0] - policy[1])).mean().detach() / self.ACCUMULATED
            )
            outputs = ChosenRejectedOutputs(*policy, None, None)
            torch.testing.assert_close(recipe._loss_fn(outputs, None).loss / self.ACCUMULATED, loss)

    def test_is_reference_free(self) -> None:
        free = [name for name in losses.LOSS_TYPES if nn.DPOLoss(loss_type=name, **required(name)).is_reference_free]
        assert free == ["simpo", "cpo", "orpo", "sft"]
        assert not nn.DPOLoss(loss_type=["cpo", "sigmoid"]).is_reference_free
        assert nn.DPOLoss(reference_free=True).is_reference_free

    def test_refuses_what_has_no_log_probs(self) -> None:
        x = torch.zeros(2)
        with pytest.raises(TypeError, match=r"policy_chosen_logps must be a floating-point tensor.*list"):
            nn.DPOLoss()([0.0, 0.0], x, x, x)
        with pytest.raises(ValueError, match=r"'sigmoid' needs ref_chosen_logps"):
            nn.DPOLoss()(ChosenRejectedOutputs(x, x, None, None), None)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiled(self) -> None:
        """`compile: True` wraps the loss in `torch.compile`; the recipe then reads its property through the wrapper."""
        torch.compiler.reset()
        policy, reference = (leaf(6), leaf(6)), (torch.randn(6), torch.randn(6))
        wanted = self.two_outputs(SimpleNamespace(_loss_fn=nn.DPOLoss()), policy, reference)
        compiled = torch.compile(nn.DPOLoss(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(self.two_outputs(SimpleNamespace(_loss_fn=compiled), policy, reference), wanted)
