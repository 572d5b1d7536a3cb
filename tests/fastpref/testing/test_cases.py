"""Tests that every case judges something, and that the cases of products have every layout and size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpref.testing.linear_cases import linear_cases
from fastpref.testing.logprobs_cases import logprobs_cases
from fastpref.testing.product_cases import LAYOUTS, ROUTES, SIZES, multiply, product_case, product_cases

CPU = torch.device("cpu")


def test_every_gradient_is_there_to_be_wrong() -> None:
    """A case with a gradient of zeros would judge nothing."""
    for case in (*logprobs_cases(), *linear_cases()):
        with case.within(CPU):
            leaves, constants = case.draw(torch.Generator().manual_seed(0))
            leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
            result = case.definition(**{name: case.layout(leaf) for name, leaf in leaves.items()}, **constants)
        first = result[0] if isinstance(result, tuple) else result
        gradients = torch.autograd.grad(first.sum(), list(leaves.values()))
        assert all(gradient.any() for gradient in gradients), case.name


class TestProducts:
    def test_cases_have_every_layout_of_each_operand_in_every_size(self) -> None:
        names = {case.name for case in product_cases()}
        assert len(names) == len(list(product_cases()))
        for rows, columns, terms in SIZES:
            for layout in LAYOUTS:
                assert f"product/{rows} x {terms} {layout}, {terms} x {columns} contiguous" in names
                assert f"product/{rows} x {terms} contiguous, {terms} x {columns} {layout}" in names
        assert {0, 1, 2} <= {size for sizes in zip(*SIZES, strict=True) for size in sizes}

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_a_layout_is_what_it_is_called(self, name: str) -> None:
        x = LAYOUTS[name](torch.arange(12.0).view(3, 4))
        assert x.shape == (3, 4)
        assert x.isfinite().all()
        strides = {
            "contiguous": (4, 1),
            "transposed": (1, 3),
            "rows apart": (7, 1),
            "columns apart": (1, 6),
            "every other column": (8, 2),
            "one row, expanded": (0, 1),
            "one column, expanded": (4, 0),
            "strides of 1": (1, 1),
            "misaligned": (4, 1),
        }
        assert x.stride() == strides[name]
        assert (x.storage_offset() == 1) == (name in ("rows apart", "columns apart", "misaligned"))

    def test_what_is_written_beside_a_result_is_an_error(self) -> None:
        def writes_beside(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
            if not add:
                out.as_strided((out.shape[0], out.shape[1] + 1), out.stride()).zero_()

        with pytest.raises(RuntimeError, match=r"\(3, 5\) and \(5, 2\) wrote beside"):
            multiply(writes_beside, torch.zeros(3, 5), torch.zeros(5, 2), torch.zeros(3, 2))

    def test_on_a_gpu_its_library_alone_is_judged(self) -> None:
        device = torch.device("cuda")
        assert [name for name, route in ROUTES.items() if route.product(device) is not None] == ["used"]
        assert not product_case("MKL", "contiguous", "contiguous", (1, 1, 1)).runs_on(device)
