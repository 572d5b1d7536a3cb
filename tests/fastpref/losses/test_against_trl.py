"""Our losses against TRL 1.16's own trainers, which are given a bigram model and asked for the loss of a batch.

The trainers are made without their constructors, with no more than their loss methods read. Both sides start at the
model's table of logits: TRL's through its loss method, ours through `sequence_logprobs` and the loss, and both end at
the gradient of that table.

Where the two are equal it is for the arguments written out in each test. Lines are those of trl/trainer/dpo_trainer.py
unless said otherwise. TRL differs from us, on purpose or not, as follows; a test below holds each one marked *.

 1. * `sigmoid` and `sigmoid_norm` ignore `label_smoothing` in silence (1388, 1510); ours is cDPO for the first and
    refuses the second.
 2. * `ipo` is always on log-ratios divided by the length (1393-1404); ours on sums, unless `length_normalize=True`.
 3. * The length it divides by, in `ipo` and `sigmoid_norm`, is counted before the shift (1400, 1506): one too many
    where the prompt is empty. Its WPO and LD-DPO count after the shift, as we do everywhere.
 4. * The exponent of the α-divergence stops at 80 (1375), in float32, where the gradient becomes 0; float64 is a
    `KeyError`. Ours stops at the dtype's largest number.
 5. * `discopop` is inf·0, a NaN, once βh is below -88 in float32 (1489); the limit is ours.
 6. * `exo_pair` rounds ε to float32, and so log ε, whatever the dtype (1410).
 7. * WPO's product is in place (1526): `hinge` then has no backward and `sft` no forward. Refused for `aot` and
    `aot_unpaired` (819), as here.
 8. `robust` with ε ≥ 1/2 warns (824), and `exo_pair` refuses ε = 0 alone (829); ours refuses everything out of range.
 9. `bco_pair` has no δ (1433): ours is 0 by default.
10. `sft` is the mean over the tokens even where LD-DPO weighs the sums (1498), and NaN of no tokens at all.
11. Rewards are β times the sums, as ours, in DPO (1582); in CPO's `simpo` and `ipo` and in ORPO they are means (*,
    experimental/cpo/cpo_trainer.py:746, experimental/orpo/orpo_trainer.py:699).
12. * CPO adds `cpo_alpha` = 1 times the likelihood by default (cpo_trainer.py:889); ours none. Both NaN where n = 0.
13. * ORPO's likelihood has weight 1 and takes in the prompt (orpo_trainer.py:793-800); our `sft_weight` is of the
    completion. Its log-odds are NaN at p = 1 (87-91), and float32 in any dtype (691).
14. KTO's mean leaves NaN losses out (kto_trainer.py:1548), and is NaN of no examples; its `apo_zero_unpaired` (*) is
    ours with `kl=0`.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpref import dpo_loss, kto_loss, pairwise_reward_loss, sequence_logprobs

pytest.importorskip("trl")
from tests.helpers.dpo import TRL_LOSS_TYPES

V = 11
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}


class Bigram(nn.Module):
    """Logits of the next token from this one alone. Answers as a model with TRL's fused head does, or with logits."""

    is_gradient_checkpointing = False

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = scale * torch.randn(V, V, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(table.to(dtype))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, fused_lm_head: bool = False, **_: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        logits = self.table[input_ids]
        if not fused_lm_head:
            return SimpleNamespace(logits=logits)
        assert labels is not None
        logits, labels = logits[:, :-1], labels[:, 1:]
        scored, logp = labels != -100, logits.log_softmax(-1)
        return FusedCausalLMOutput(
            log_probs=logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored,
            entropy=-(logp.exp() * logp).sum(-1) * scored,
            log_sum_sq_probs=(2 * logp).logsumexp(-1).detach() * scored,
            mean_logits=logits.mean(-1).detach() * scored,
            is_top1=(logits.argmax(-1) == labels) & scored,
            label_mask=scored,
        )


def batch(pairs: int = 5, time: int = 9, prompt: int = 2) -> dict[str, Tensor]:
    """Return [chosen; rejected] sequences of a prompt, a completion of one token or more, and padding."""
    ids = torch.randint(V, (2 * pairs, time))
    ends = torch.randint(prompt + 2, time + 1, (2 * pairs, 1))
    place = torch.arange(time)
    return {
        "input_ids": ids,
        "attention_mask": (place < ends).long(),
        "completion_mask": ((place >= prompt) & (place < ends)).long(),
    }


def labels_of(inputs: dict[str, Tensor], prefix: str = "") -> Tensor:
    return inputs[f"{prefix}input_ids"].masked_fill(inputs[f"{prefix}completion_mask"] == 0, -100)


def trainer(name: str, model: nn.Module, ref_model: nn.Module | None = None, **attributes: Any) -> Any:
    """A trainer of this class that has never met its constructor."""
    import trl

    kind = getattr(trl, name)
    made = object.__new__(kind)
    made.__dict__.update(
        accelerator=ACCELERATOR,
        model=model,
        ref_model=ref_model,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        beta=0.1,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05, center_rewards_coefficient=None),
    )
    made.__dict__.update(attributes)
    return made


def trl_dpo(
    model: Bigram, ref: Bigram, inputs: dict[str, Tensor], loss_type: str | list[str] = "sigmoid", **attributes: Any
) -> tuple[Tensor, dict[str, float]]:
    """Return TRL's loss and what it logs."""
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    settings = {
        "loss_types": types,
        "loss_weights": attributes.pop("loss_weights", None) or [1.0] * len(types),
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "use_weighting": False,
        **attributes,
    }
    made = trainer("DPOTrainer", model, ref, **settings)
    loss = made.compute_loss(model, dict(inputs))
    return loss, {name: values[-1] for name, values in made._metrics["train"].items() if isinstance(values, list)}


def our_dpo(
    model: Bigram,
    ref: Bigram,
    inputs: dict[str, Tensor],
    *,
    ld_alpha: float | None = None,
    weighting: bool = False,
    **options: Any,
) -> Any:
    labels = labels_of(inputs)
    n = (labels[:, 1:] != -100).sum(1)
    shared = torch.minimum(*n.chunk(2)).repeat(2) if ld_alpha is not None else None
    keywords: dict[str, Any] = {"ld_alpha": ld_alpha, "shared_lengths": shared}
    scored = sequence_logprobs(model.table[inputs["input_ids"]], labels, stats=("log_sum_sq_probs",), **keywords)
    with torch.no_grad():
        reference = sequence_logprobs(ref.table[inputs["input_ids"]], labels, **keywords)
    if weighting:
        mean = (scored.logprobs - scored.log_sum_sq_probs.sum(1)) / n.clamp(min=1)
        options["weights"] = mean.view(2, -1).sum(0).exp()
    chosen, rejected = n.chunk(2)
    return dpo_loss(
        *scored.logprobs.chunk(2), *reference.chunk(2), chosen_lengths=chosen, rejected_lengths=rejected, **options
    )


def close(got: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, check_dtype=False)


def compare(
    loss_type: str | list[str],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
    scale: float = 1.0,
) -> None:
    """Compare the loss, the model's gradient and the logged rewards, at the default β and at another."""
    for beta in (0.1, 0.6):
        model, ref, inputs = Bigram(1, dtype, scale), Bigram(2, dtype, scale), batch()
        wanted, logged = trl_dpo(model, ref, inputs, loss_type, beta=beta, **theirs)
        got = our_dpo(model, ref, inputs, loss_type=loss_type, beta=beta, **ours)
        close(got.loss, wanted, tolerance)
        slopes = [torch.autograd.grad(x, model.table)[0] for x in (got.loss, wanted)]
        assert slopes[1].abs().max() > 1e-4
        close(*slopes, tolerance)
        types = {loss_type} if isinstance(loss_type, str) else set(loss_type)
        if types != {"sft"}:  # whose rewards are against zeros here
            for name, values in (("chosen", got.chosen_rewards), ("rejected", got.rejected_rewards)):
                assert values.mean().item() == pytest.approx(logged[f"rewards/{name}"], rel=tolerance, abs=tolerance)
            assert got.margins.mean().item() == pytest.approx(logged["rewards/margins"], rel=tolerance, abs=tolerance)
            assert got.accuracies.mean().item() == pytest.approx(logged["rewards/accuracies"])


def needed(loss_type: str) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Return the options of our loss and of TRL's for the same formula, and how near the results come."""
    if loss_type == "ipo":
        return {"length_normalize": True}, {}, 1e-12
    if loss_type == "exo_pair":
        return {"label_smoothing": 0.01}, {"label_smoothing": 0.01}, 1e-7
    return {}, {}, 1e-12


class TestDpo:
    @pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
    def test_loss_types(self, loss_type: str) -> None:
        ours, theirs, tolerance = needed(loss_type)
        compare(loss_type, ours, theirs, tolerance=tolerance)

    def test_these_are_all(self) -> None:
        with pytest.raises(ValueError, match="Unknown loss type") as raised:
            trl_dpo(Bigram(1), Bigram(2), batch(), "none of them")
        assert set(str(raised.value).split("'")[1::2]) == set(TRL_LOSS_TYPES)

    @pytest.mark.parametrize(
        ("loss_type", "eps"),
        [
            ("robust", 0.1),
            ("robust", 0.45),
            ("aot", 0.2),
            ("aot_unpaired", 0.2),
            ("exo_pair", 0.3),
        ],
    )
    def test_label_smoothing(self, loss_type: str, eps: float) -> None:
        tolerance = 1e-7 if loss_type == "exo_pair" else 1e-12
        compare(loss_type, {"label_smoothing": eps}, {"label_smoothing": eps}, tolerance=tolerance)

    @pytest.mark.parametrize(
        ("types", "weights"),
        [
            (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
            (["hinge", "apo_zero"], None),
            (["sigmoid_norm", "discopop", "sppo_hard", "nca_pair"], [1.0, 0.5, -0.25, 2.0]),
        ],
    )
    def test_lists(self, types: list[str], weights: list[float] | None) -> None:
        compare(types, {"loss_weights": weights}, {"loss_weights": weights})

    @pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm"])
    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_divergences(self, loss_type: str, name: str) -> None:
        ours, theirs, tolerance = needed(loss_type)
        alpha = name == "alpha_divergence"  # float32 alone, there
        compare(
            loss_type,
            {**ours, "f_divergence": DIVERGENCES[name]},
            {**theirs, "f_divergence_type": name},
            dtype=torch.float32 if alpha else torch.float64,
            tolerance=2e-5 if alpha else tolerance,
            scale=0.5,
        )

    @pytest.mark.parametrize("alpha", [0.25, 1.0, 1.5])
    def test_alpha(self, alpha: float) -> None:
        ours = {"f_divergence": "alpha", "f_alpha": alpha}
        theirs = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        compare("sigmoid", ours, theirs, dtype=torch.float32, tolerance=2e-5, scale=0.5)

    @pytest.mark.parametrize(
        "loss_type", [t for t in TRL_LOSS_TYPES if t not in ("hinge", "sft", "aot", "aot_unpaired")]
    )
    def test_wpo(self, loss_type: str) -> None:
        ours, theirs, tolerance = needed(loss_type)
        compare(loss_type, {**ours, "weighting": True}, {**theirs, "use_weighting": True}, tolerance=tolerance)

    @pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm", "apo_down", "aot"])
    @pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
    def test_ld(self, loss_type: str, ld_alpha: float) -> None:
        ours, theirs, tolerance = needed(loss_type)
        compare(loss_type, {**ours, "ld_alpha": ld_alpha}, {**theirs, "ld_alpha": ld_alpha}, tolerance=tolerance)

    def test_float32(self) -> None:
        compare("sigmoid", {}, {}, dtype=torch.float32, tolerance=1e-5)


class TestDpoDifferences:
    """TRL differs as listed above. Where one of these fails, TRL has changed."""

    model, ref = Bigram(1), Bigram(2)

    @pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
    def test_label_smoothing_is_ignored(self, loss_type: str) -> None:
        inputs = batch()
        wanted, _ = trl_dpo(self.model, self.ref, inputs, loss_type, label_smoothing=0.3)
        close(our_dpo(self.model, self.ref, inputs, loss_type=loss_type).loss, wanted)
        smoothed = our_dpo(
            self.model, self.ref, inputs, label_smoothing=0.3, length_normalize=loss_type == "sigmoid_norm"
        )
        assert abs(smoothed.loss - wanted) > 1e-4

    def test_ipo_is_a_mean(self) -> None:
        inputs = batch()
        wanted, _ = trl_dpo(self.model, self.ref, inputs, "ipo")
        assert abs(our_dpo(self.model, self.ref, inputs, loss_type="ipo").loss - wanted) > 0.1

    @pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
    def test_lengths_before_the_shift(self, loss_type: str) -> None:
        inputs = batch(prompt=0)
        wanted, _ = trl_dpo(self.model, self.ref, inputs, loss_type)
        labels = labels_of(inputs)
        after = our_dpo(self.model, self.ref, inputs, loss_type=loss_type, length_normalize=True)
        assert abs(after.loss - wanted) > 1e-3
        logps = sequence_logprobs(self.model.table[inputs["input_ids"]], labels)
        ref = sequence_logprobs(self.ref.table[inputs["input_ids"]], labels)
        chosen, rejected = (labels != -100).sum(1).chunk(2)
        n = {"chosen_lengths": chosen, "rejected_lengths": rejected, "length_normalize": True}
        close(dpo_loss(*logps.chunk(2), *ref.chunk(2), loss_type=loss_type, **n).loss, wanted)

    def test_alpha_stops_at_80(self) -> None:
        # The chosen completions' ratios are below -190, the exponents past 88.
        model, ref, inputs = Bigram(1, torch.float32), Bigram(2, torch.float32), batch()
        with torch.no_grad():
            model.table *= 0
            model.table[:, 0] = 200
            ref.table *= 0
        inputs["input_ids"][:5].clamp_(min=1)
        inputs["input_ids"][5:] = 0
        wanted, _ = trl_dpo(model, ref, inputs, f_divergence_type="alpha_divergence")
        assert wanted.isfinite()
        got = our_dpo(model, ref, inputs, f_divergence="alpha").loss
        assert got > 1e3 * wanted
        with pytest.raises(KeyError, match="float64"):
            trl_dpo(self.model, self.ref, inputs, f_divergence_type="alpha_divergence")

    def test_discopop_is_nan_far_below_zero(self) -> None:
        model, ref, inputs = Bigram(1, torch.float32, 100.0), Bigram(2, torch.float32), batch()
        wanted, _ = trl_dpo(model, ref, inputs, "discopop", beta=5.0)
        assert wanted.isnan()
        got = our_dpo(model, ref, inputs, loss_type="discopop", beta=5.0).loss
        assert got.isfinite()
        assert torch.autograd.grad(got, model.table)[0].isfinite().all()

    def test_exo_pair_rounds_its_epsilon(self) -> None:
        inputs = batch()
        wanted, _ = trl_dpo(self.model, self.ref, inputs, "exo_pair", label_smoothing=1e-3)
        got = our_dpo(self.model, self.ref, inputs, loss_type="exo_pair", label_smoothing=1e-3).loss
        assert 1e-10 < abs(got - wanted) / wanted < 1e-6

    def test_wpo_of_hinge_and_sft(self) -> None:
        inputs = batch()
        loss, _ = trl_dpo(self.model, self.ref, inputs, "hinge", use_weighting=True)
        got = our_dpo(self.model, self.ref, inputs, loss_type="hinge", weighting=True).loss
        close(got, loss)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert torch.autograd.grad(got, self.model.table)[0].abs().max() > 0
        with pytest.raises(RuntimeError, match="single memory location"):
            trl_dpo(self.model, self.ref, inputs, "sft", use_weighting=True)


def experimental(name: str, model: nn.Module, **attributes: Any) -> Any:
    from trl.experimental import cpo, orpo

    made = object.__new__(cpo.CPOTrainer if name == "cpo" else orpo.ORPOTrainer)
    made.__dict__.update(
        accelerator=ACCELERATOR,
        model=model,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        aux_loss_enabled=False,
        alpha=0.0,
        beta=0.1,
        label_smoothing=0.0,
        cpo_alpha=0.0,
        simpo_gamma=0.5,
    )
    made.__dict__.update(attributes)
    return made


def as_pairs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch as CPO and ORPO take it."""
    columns = {**inputs, "labels": labels_of(inputs)}
    del columns["completion_mask"]
    halves = {name: values.chunk(2) for name, values in columns.items()}
    return {
        f"{side}_{name}": values[i] for i, side in enumerate(("chosen", "rejected")) for name, values in halves.items()
    }


def without_reference(model: Bigram, inputs: dict[str, Tensor], **options: Any) -> Any:
    labels = labels_of(inputs)
    chosen, rejected = (labels[:, 1:] != -100).sum(1).chunk(2)
    logps = sequence_logprobs(model.table[inputs["input_ids"]], labels).chunk(2)
    return dpo_loss(*logps, chosen_lengths=chosen, rejected_lengths=rejected, **options)


class TestCpo:
    @pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3])
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ({"loss_type": "sigmoid"}, {"loss_type": "cpo"}),
            ({"loss_type": "sigmoid", "label_smoothing": 0.2}, {"loss_type": "cpo", "label_smoothing": 0.2}),
            ({"loss_type": "simpo"}, {"loss_type": "simpo"}),
            (
                {"loss_type": "simpo", "label_smoothing": 0.2, "simpo_gamma": 1.2, "beta": 2.0},
                {"loss_type": "simpo", "label_smoothing": 0.2, "gamma": 1.2, "beta": 2.0},
            ),
            ({"loss_type": "hinge"}, {"loss_type": "hinge", "reference_free": True}),
            ({"loss_type": "ipo"}, {"loss_type": "ipo", "reference_free": True, "length_normalize": True}),
        ],
        ids=["cpo", "cpo smoothed", "simpo", "simpo smoothed", "hinge", "ipo"],
    )
    def test_loss(self, theirs: dict[str, Any], ours: dict[str, Any], alpha: float) -> None:
        model, inputs = Bigram(1), batch()
        wanted, metrics = experimental("cpo", model, cpo_alpha=alpha, **theirs).get_batch_loss_metrics(
            model, as_pairs(inputs)
        )
        got = without_reference(model, inputs, sft_weight=alpha, **ours)
        close(got.loss, wanted)
        close(*(torch.autograd.grad(x, model.table)[0] for x in (got.loss, wanted)))
        # Means for these two there, sums here.
        n = (labels_of(inputs)[:5, 1:] != -100).sum(1) if theirs["loss_type"] in ("simpo", "ipo") else 1
        assert (got.chosen_rewards / n).mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-12)

    def test_defaults(self) -> None:
        from trl.experimental.cpo import CPOConfig

        defaults = {name: field.default for name, field in CPOConfig.__dataclass_fields__.items()}
        assert [defaults[x] for x in ("beta", "label_smoothing", "simpo_gamma", "cpo_alpha")] == [0.1, 0.0, 0.5, 1.0]


class TestOrpo:
    @pytest.mark.parametrize("beta", [0.1, 0.8])
    def test_loss(self, beta: float) -> None:
        model, inputs = Bigram(1), batch()
        wanted, metrics = experimental("orpo", model, beta=beta).get_batch_loss_metrics(model, as_pairs(inputs))
        got = without_reference(model, inputs, loss_type="orpo", beta=beta)
        everything = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:5]
        logps = sequence_logprobs(model.table[inputs["input_ids"][:5]], everything)
        with_prompt = got.loss - logps.sum() / (everything[:, 1:] != -100).sum()
        close(with_prompt, wanted, 1e-6)
        close(*(torch.autograd.grad(x, model.table)[0] for x in (with_prompt, wanted)), 1e-6)
        n = (labels_of(inputs)[:5, 1:] != -100).sum(1)
        assert (got.chosen_rewards / n).mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-6)

    def test_its_log_odds_at_certainty(self) -> None:
        made = experimental("orpo", Bigram(1))
        zero = torch.zeros(1)
        assert made.odds_ratio_loss(zero, zero)[0].isnan()
        one = torch.ones(1, dtype=torch.long)
        ours = dpo_loss(zero, zero, loss_type="orpo", chosen_lengths=one, rejected_lengths=one).loss
        assert not ours.isnan()


class TestKto:
    @staticmethod
    def inputs() -> dict[str, Tensor]:
        other = batch(time=7)
        return {
            **batch(),
            **{f"KL_{name}": values for name, values in other.items()},
            "label": torch.tensor([True, False, True, True, False, False, False, True, False, True]),
        }

    @staticmethod
    def ours(model: Bigram, ref: Bigram, inputs: dict[str, Tensor], kl: Any, **options: Any) -> Any:
        labels = labels_of(inputs)
        logps = sequence_logprobs(model.table[inputs["input_ids"]], labels)
        ref_logps = sequence_logprobs(ref.table[inputs["input_ids"]], labels).detach()
        return kto_loss(logps, ref_logps, inputs["label"], kl=kl, **options)

    @pytest.mark.parametrize("below", [False, True], ids=["above zero", "below zero"])
    @pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 1.0), (1.33, 0.5)])
    def test_loss(self, below: bool, desirable: float, undesirable: float) -> None:
        model, ref, inputs = Bigram(1), Bigram(2), self.inputs()
        kl_labels = labels_of(inputs, "KL_")

        def divergence() -> Tensor:
            a, b = (sequence_logprobs(m.table[inputs["KL_input_ids"]], kl_labels).detach() for m in (model, ref))
            return a - b

        if (divergence().mean() < 0) != below:
            model, ref = ref, model
        kl = divergence()
        assert (kl.mean() < 0).item() is below
        weights = {"desirable_weight": desirable, "undesirable_weight": undesirable, "beta": 0.3}
        made = trainer("KTOTrainer", model, ref, loss_type="kto", calculate_KL=True, **weights)
        wanted = made.compute_loss(model, dict(inputs))
        got = self.ours(model, ref, inputs, kl, **weights)
        close(got.loss, wanted)
        close(*(torch.autograd.grad(x, model.table)[0] for x in (got.loss, wanted)))
        for name, which in (("chosen", inputs["label"]), ("rejected", ~inputs["label"])):
            assert got.rewards[which].mean().item() == pytest.approx(made._metrics["train"][f"rewards/{name}"][0])

    def test_apo_zero_unpaired_is_no_baseline(self) -> None:
        model, ref, inputs = Bigram(1), Bigram(2), self.inputs()
        weights = {"desirable_weight": 1.5, "undesirable_weight": 1.0}
        made = trainer("KTOTrainer", model, ref, loss_type="apo_zero_unpaired", calculate_KL=False, **weights)
        main = {name: values for name, values in inputs.items() if not name.startswith("KL_")}
        wanted = made.compute_loss(model, main)
        close(self.ours(model, ref, inputs, 0.0, **weights).loss, wanted)


class Rewards(nn.Module):
    """A reward model that has made up its mind."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.values[:, None])


class TestReward:
    @pytest.mark.parametrize("margin", [False, True])
    @pytest.mark.parametrize("center", [None, 0.01, 1.0])
    def test_loss(self, margin: bool, center: float | None) -> None:
        model = Rewards(2 * torch.randn(10, dtype=torch.float64))
        each = torch.rand(5, dtype=torch.float64) if margin else None
        inputs = {"attention_mask": torch.ones(10, 3), **({"margin": each} if margin else {})}
        args = SimpleNamespace(center_rewards_coefficient=center)
        wanted = trainer("RewardTrainer", model, args=args).compute_loss(model, inputs)
        got = pairwise_reward_loss(*model.values.chunk(2), margin=each, center_weight=center or 0.0)
        close(got, wanted)
        close(*(torch.autograd.grad(x, model.values)[0] for x in (got, wanted)))
