"""Every loss of `fastpref.losses.TABLE`: its definition, its oracle, and what all losses refuse."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.losses import RLHF, TABLE, Entry, Loss, rlhf
from tests.helpers.losses import evaluate, every_loss, example, fields, value_of
from tests.helpers.marks import packages
from tests.oracles import table
from tests.tolerance import assert_accurate


class TestEveryLoss:
    def test_table_is_complete(self) -> None:
        assert len({loss.name for loss in TABLE}) == len(TABLE)
        for loss in TABLE:
            assert loss.name.split(":")[0] == loss.function.__name__ == loss.reference.__name__
            assert inspect.signature(loss.function) == inspect.signature(loss.reference), loss.name
            assert re.fullmatch(r"\d{4}\.\d{5}", loss.paper)
            assert loss.formula
            assert loss.meaning
            assert hasattr(torch.ops.fastpref, loss.operator)

    def test_rlhf_is_listed_whole(self) -> None:
        functions = {name for name in rlhf.__all__ if inspect.isfunction(getattr(rlhf, name))}
        assert {entry.name for entry in RLHF} == functions
        for entry in RLHF:
            assert entry.function.__name__ == entry.reference.__name__ == entry.name
            assert re.fullmatch(r"\d{4}\.\d{5}", entry.paper)

    @every_loss
    @pytest.mark.parametrize("scale", [1.0, 100.0], ids=["typical", "large"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_against_the_definition(self, loss: Loss, dtype: torch.dtype, reduction: str, scale: float) -> None:
        arguments = example(loss, 9, dtype, scale)
        truth = evaluate(loss.reference, arguments, torch.float64, reduction=reduction)
        # Float32 is what eager would be given: a (B,) loss is never computed in less.
        eager = evaluate(loss.reference, arguments, torch.promote_types(dtype, torch.float32), reduction=reduction)
        ours = evaluate(loss.function, arguments, dtype, reduction=reduction)
        results = len(truth) - sum(t.is_floating_point() for t in arguments[0])
        for i, (got, peer, right) in enumerate(zip(ours, eager, truth, strict=True)):
            assert_accurate(got, peer if i < results else peer.to(dtype), right, f"{loss.name}[{i}]")

    @every_loss
    def test_against_the_oracle(self, loss: Loss) -> None:
        tensors, options = example(loss, 6)
        found = value_of(loss.function(*tensors, **options, reduction="none"))
        torch.testing.assert_close(found, table.LOSSES[loss.name](*tensors, **options), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("entry", RLHF, ids=lambda entry: entry.name)
    @packages
    def test_a_part_of_ppo_against_its_oracle(self, package: Any, entry: Entry) -> None:
        tensors, options = entry.example(torch.Generator().manual_seed(0), 6)
        found = getattr(package, entry.name)(*tensors, **options)
        wanted = table.RLHF[entry.name](*tensors, **options)
        for value, right in zip(fields(found), fields(wanted), strict=True):
            right = torch.as_tensor(right, dtype=torch.float64)
            torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-13)

    @every_loss
    def test_gradcheck(self, loss: Loss) -> None:
        tensors, options = example(loss, 3)
        leaves = [t.requires_grad_(t.is_floating_point()) for t in tensors]
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda *x, how=reduction: value_of(loss.function(*x, **options, reduction=how)), leaves
            )

    @every_loss
    def test_reductions_agree(self, loss: Loss) -> None:
        tensors, options = example(loss, 7)
        each = value_of(loss.function(*tensors, **options, reduction="none"))
        assert each.shape == (7,)
        close = torch.testing.assert_close
        close(value_of(loss.function(*tensors, **options, reduction="sum")), each.sum(), rtol=1e-14, atol=0)
        close(value_of(loss.function(*tensors, **options, reduction="mean")), each.sum() / 7, rtol=1e-14, atol=0)
        close(value_of(loss.function(*tensors, **options)), each.sum() / 7, rtol=1e-14, atol=0)

    @every_loss
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_empty_batch(self, loss: Loss, reduction: str) -> None:
        result, *rest = evaluate(loss.function, example(loss, 0), torch.float64, reduction=reduction)
        assert result.shape == ((0,) if reduction == "none" else ())
        assert result.sum() == 0
        assert all(value.numel() == 0 for value in rest)

    @every_loss
    def test_batch_of_one(self, loss: Loss) -> None:
        tensors, options = example(loss, 1)
        mean = value_of(loss.function(*tensors, **options))
        assert mean.shape == ()
        assert torch.equal(mean, value_of(loss.function(*tensors, **options, reduction="none"))[0])

    @every_loss
    def test_each_element_is_its_own_unless_the_table_says_it_mixes(self, loss: Loss) -> None:
        tensors, options = example(loss, 6, torch.float32)
        each = value_of(loss.function(*tensors, **options, reduction="none"))
        alone = torch.cat(
            [
                value_of(
                    loss.function(
                        *(t[i : i + 1] for t in tensors),
                        reduction="none",
                        **{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in options.items()},
                    )
                )
                for i in range(6)
            ]
        )
        assert torch.allclose(alone, each, rtol=3e-7, atol=3e-7) != loss.mixes

    @every_loss
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
    def test_extremes_are_finite(self, loss: Loss, scale: float, dtype: torch.dtype) -> None:
        for values in evaluate(loss.function, example(loss, 16, dtype, scale), dtype):
            assert values.isfinite().all()

    @every_loss
    def test_strided_inputs(self, loss: Loss) -> None:
        tensors, options = example(loss, 5)
        wanted = value_of(loss.function(*tensors, **options, reduction="none"))
        strided = [torch.stack((t, t), -1)[..., 0] for t in tensors]
        assert not any(t.is_contiguous() for t in strided)
        assert torch.equal(value_of(loss.function(*strided, **options, reduction="none")), wanted)

    @every_loss
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self, loss: Loss) -> None:
        torch.compiler.reset()
        compiled = torch.compile(loss.function, fullgraph=True, backend="aot_eager")
        arguments = example(loss, 5)
        both = (evaluate(function, arguments, torch.float64) for function in (loss.function, compiled))
        for wanted, got in zip(*both, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-15)


class TestRefusals:
    """An error names the argument, what was given and what is wanted."""

    @every_loss
    def test_dtypes(self, loss: Loss) -> None:
        tensors, options = example(loss, 4)
        for i, name in enumerate(list(inspect.signature(loss.function).parameters)[: len(tensors)]):
            wrong = tensors[i].long() if tensors[i].is_floating_point() else tensors[i].double()
            with pytest.raises(TypeError, match=rf"{name} must be .*{wrong.dtype}"):
                loss.function(*tensors[:i], wrong, *tensors[i + 1 :], **options)
        for name, value in options.items():
            if isinstance(value, Tensor):
                with pytest.raises(TypeError, match=rf"{name} must be .*torch.complex64"):
                    loss.function(*tensors, **{**options, name: value.to(torch.complex64)})

    @every_loss
    def test_shapes(self, loss: Loss) -> None:
        tensors, options = example(loss, 4)
        names = list(inspect.signature(loss.function).parameters)[: len(tensors)]
        for i, name in enumerate(names[1:], 1):
            longer = torch.cat((tensors[i], tensors[i][:1]))
            with pytest.raises(ValueError, match=rf"{name} must .*4.*5"):
                loss.function(*tensors[:i], longer, *tensors[i + 1 :], **options)
        for name, value in options.items():
            if isinstance(value, Tensor) and name != "kl":  # estimates, as many as there are
                with pytest.raises(ValueError, match=rf"{name} must .*4.*3"):
                    loss.function(*tensors, **{**options, name: value[:3]})
        with pytest.raises(ValueError, match=names[0]):
            loss.function(*(t[None] for t in tensors), **options)

    @every_loss
    def test_devices(self, loss: Loss) -> None:
        tensors, options = example(loss, 4)
        for i, name in enumerate(list(inspect.signature(loss.function).parameters)[1 : len(tensors)], 1):
            with pytest.raises(ValueError, match=rf"{name} must be on .*cpu.*meta"):
                loss.function(*tensors[:i], tensors[i].to("meta"), *tensors[i + 1 :], **options)

    @every_loss
    def test_reduction(self, loss: Loss) -> None:
        tensors, options = example(loss, 4)
        with pytest.raises(ValueError, match=r"reduction must be .*'mean'.*'batchmean'"):
            loss.function(*tensors, **options, reduction="batchmean")
