"""Wrong options and shapes, as configuration files and reward heads give them, are refused by name."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import dpo_loss, linear_dpo_loss, nn, pairwise_reward_loss, reference
from fastpref.distributed import sum_parts
from fastpref.losses import RLHF, TABLE
from tests.helpers.losses import fields

PAIRS = 4
HIDDEN, WEIGHT = torch.randn(2 * PAIRS, 5, 3), torch.randn(7, 3)
LABELS = torch.randint(7, (2 * PAIRS, 5))
LOGITS = torch.randn(2 * PAIRS, 5, 7)
REFERENCES = {"ref_chosen_logps": torch.randn(PAIRS), "ref_rejected_logps": torch.randn(PAIRS)}
# Wrong values for each kind of option.
NO_NUMBER: tuple[Any, ...] = ("0.1", "x", None, [0.1], (0.1, 0.2, 0.3), {"a": 1.0}, True, 1j, torch.tensor(0.5))
OUT_OF_RANGE = (math.nan, math.inf, -math.inf)
NOT_ABOVE_ZERO = (-1, -1.0, Fraction(-1, 2))
# Options that hold integers or names, alone or in a container: what is wrong is a type, or a value, of either.
EITHER_ERROR = ("loss_type", "loss_weights", "chunk_rows", "scored_rows", "keep")
NO_PAIR: tuple[Any, ...] = (
    "23",
    b"23",
    (0.1, "0.2"),
    [None, 0.2],
    [True, 0.2],
    (0.1, math.nan),
    [[0.1], 0.2],
    (0, 0),
    0,
)
NO_INT: tuple[Any, ...] = ("1", None, [1], 1.5, math.nan, True, 2**63)
NO_BOOL: tuple[Any, ...] = ("false", "true", None, 0, 1, 0.0, 1.0, [True], math.nan)
NO_CHOICE: tuple[Any, ...] = ("Mean!", "Token", "", None, ["mean"], {"mean": 1}, {"token"}, 1, True, math.nan)
NO_NAMES: tuple[Any, ...] = (None, 1, True, {"lse": 1}, "lse", ["lsee"], [None], [["lse"]], {"lse"}, ["lse", "lse"])
NO_LOSS_TYPES: tuple[Any, ...] = (
    None,
    1.0,
    True,
    "dpo",
    [],
    {},
    ["sigmoid", None],
    [["sigmoid"]],
    {"sigmoid", "hinge"},
    {"dpo": 1.0},
    {"sigmoid": None},
    {"sigmoid": "1"},
    {"sigmoid": math.nan},
    {"sigmoid": True},
    {1: 1.0},
    iter(["sigmoid"]),
)
NO_WEIGHTS: tuple[Any, ...] = (1.0, "1", b"1", [1.0, 2.0], [None], ["1"], [math.nan], [True], {"sigmoid": 1.0}, {1.0})


class Case(NamedTuple):
    """An option of a function, what it is called with beside the option, and values that the option must refuse."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    option: str
    default: Any
    wrong: Sequence[Any]


def numbers(values: Sequence[Any] = NO_NUMBER) -> tuple[Any, ...]:
    """Return values without None and tensors, which some options take."""
    return tuple(value for value in values if value is not None and not isinstance(value, Tensor))


def optional(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return values without None."""
    return tuple(value for value in values if value is not None)


def wrong_values(name: str, default: Any, *, of_pairs: bool) -> Sequence[Any]:
    """Return values that an option must refuse; `of_pairs` says whether it is one of a loss of pairs."""
    counts = (*numbers(), *OUT_OF_RANGE, -1)
    of_name: dict[str, Sequence[Any]] = {
        "loss_type": NO_LOSS_TYPES,
        "loss_weights": NO_WEIGHTS,
        "stats": NO_NAMES,
        "chunk_rows": (*optional(NO_INT), 0, -1),
        "group_size": (*NO_INT, 0, -1, 3),
        "scored_rows": (*optional(NO_INT), -1, [1], [4] * 9, [4, -1], [4, 1.5], 1, [0, 0]),
        "ignore_index": NO_INT,
        "keep": (*optional(NO_INT), -1),
        "dp_size": (*NO_INT, "8", [8], 0, -1),
        "margin": (*optional(NO_NUMBER), *OUT_OF_RANGE),
        "kl": (None, *numbers(), *OUT_OF_RANGE),
        "clip": (*NO_NUMBER, *OUT_OF_RANGE, *NOT_ABOVE_ZERO, *NO_PAIR),
        "denominator": (*counts, torch.ones(2)),
        "batch_num_tokens": counts,
        "global_batch_size": counts,
    }
    if name in of_name:
        return of_name[name]
    if isinstance(default, bool):
        return NO_BOOL
    if isinstance(default, str):
        return NO_CHOICE
    if default is None:
        ranges = {"softcap": (0, 0.0, -1), "filter_eps": (0, 1, 1.0, -1e-3), "ld_alpha": ()}
        return (*optional(NO_NUMBER), *OUT_OF_RANGE, *ranges.get(name, NOT_ABOVE_ZERO))
    any_number = name in ("delta", "f_alpha") or (name == "gamma" and of_pairs)
    return (*NO_NUMBER, torch.ones(2), *OUT_OF_RANGE, *(() if any_number else NOT_ABOVE_ZERO))


def functions() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Yield a name, a public function or module's constructor, and arguments that it takes."""
    for name in ("token_logprobs", "sequence_logprobs"):
        yield f"fastpref.{name}", getattr(fastpref, name), (LOGITS, LABELS), {}
        yield f"fastpref.linear_{name}", getattr(fastpref, f"linear_{name}"), (HIDDEN, WEIGHT, LABELS), {}
    yield "fastpref.linear_dpo_loss", fastpref.linear_dpo_loss, (HIDDEN, WEIGHT, LABELS), REFERENCES
    arguments = (HIDDEN, WEIGHT, LABELS, lambda logps: logps.sum(-1))
    yield "fastpref.linear_preference_loss", fastpref.linear_preference_loss, arguments, {"group_size": 2}
    yield "fastpref.implicit_reward", fastpref.implicit_reward, tuple(REFERENCES.values()), {}
    # One row of each function, whose other options have their defaults.
    for entry in {entry.function: entry for entry in reversed(TABLE)}.values():
        drawn, options = entry.example(torch.Generator().manual_seed(0), PAIRS)
        yield f"fastpref.{entry.function.__name__}", entry.function, drawn, options
    modules = ("DPOLoss", "KTOLoss", "KTOSplitLoss", "PairwiseRewardLoss", "BestOfKLoss", "RankingLoss")
    for name in (*modules, "PlackettLuceLoss", "PPOPolicyLoss", "PPOValueLoss"):
        yield f"nn.{name}", getattr(nn, name), (), {}
    tokens = tuple(torch.randn(3, PAIRS, 5))
    for name in ("PPOPolicyLoss", "PPOValueLoss"):
        yield f"nn.{name}.forward", getattr(nn, name)().forward, tokens, {}
        step = functools.partial(getattr(nn, name)(reduction="sequence").forward, *tokens)
        yield f"nn.{name}.forward of sequences", step, (), {}
    for entry in RLHF:
        drawn, options = entry.example(torch.Generator().manual_seed(0), PAIRS)
        yield f"fastpref.{entry.name}", entry.function, drawn, options
    yield "release_memory", fastpref.release_memory, (), {}


def scalar_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's options that are no tensors, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if (parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty)
        and not re.fullmatch(r"Tensor( \| None)?|Any", str(parameter.annotation))
    }


def cases() -> Iterator[Case]:
    for name, function, arguments, options in functions():
        for option, default in scalar_options(function).items():
            wrong = wrong_values(option, default, of_pairs="loss_type" in inspect.signature(function).parameters)
            yield Case(f"{name}-{option}", function, arguments, options, option, default, wrong)
    controller = {"init": 0.1, "target": 6.0, "horizon": 1000.0}
    for option, default in controller.items():
        wrong = (*wrong_values(option, default, of_pairs=False), 0)
        yield Case(f"controller-{option}", fastpref.AdaptiveKLController, (), controller, option, default, wrong)
    step, update = {"kl": 5.0, "n": 10}, fastpref.AdaptiveKLController(**controller).update
    wrong = {"kl": (None, "5", [5.0], torch.ones(2), True, 1j, math.nan), "n": wrong_values("n", 10, of_pairs=False)}
    for option, default in step.items():
        yield Case(f"controller.update-{option}", update, (), step, option, default, wrong[option])


CASES = list(cases())


def shows(words: str, value: Any) -> bool:
    """Return whether an error shows what was given, or the element of it that is wrong."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}" in words
    held = [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, (list, set)) else []
    return any(repr(given) in words for given in (value, *held))


def refused(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Exception | None:
    try:
        function(*arguments, **options)
    except (TypeError, ValueError) as error:
        return error
    return None


def wanted_error(case: Case, value: Any) -> type[Exception] | None:
    """Return the type of the error that a value must raise, or None where either will do."""
    if isinstance(case.default, (bool, float)) and type(value) in (str, list, dict):
        return TypeError
    if case.option in EITHER_ERROR or not isinstance(case.default, (str, bool, float, type(None))):
        return None
    if isinstance(value, (type(None), bool, dict, complex)):
        return TypeError
    if isinstance(value, (int, float)) and not isinstance(case.default, (str, bool)):
        return ValueError
    return None


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_wrong_option_is_refused_by_name(case: Case) -> None:
    failures = []
    for value in case.wrong:
        error = refused(case.function, case.arguments, {**case.options, case.option: value})
        words = str(error)
        if error is None or not re.match(rf"(a weight in )?{case.option}\b.* must ", words) or not shows(words, value):
            failures.append(f"{value!r}: {type(error).__name__} {words}")
        wanted = wanted_error(case, value)
        if wanted is not None and not isinstance(error, wanted):
            failures.append(f"{value!r}: {type(error).__name__} and no {wanted.__name__}")
    assert not failures, "\n".join(failures)


def test_every_option_of_ppo_is_here() -> None:
    found = {(case.name.split("-")[0].removeprefix("fastpref."), case.option) for case in CASES}
    options = {
        (entry.name, option)
        for entry in RLHF
        for option, parameter in inspect.signature(entry.function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert options <= found
    assert {"clip", "dual_clip", "gamma", "lam", "kl_coef", "estimator", "shift_mean", "reduction", "denominator"} < {
        option for _, option in options
    }


def test_a_refused_update_leaves_the_controller_as_it_was() -> None:
    controller = fastpref.AdaptiveKLController(0.1, 6.0, 1000)
    for case in CASES:
        if case.name.startswith("controller.update"):
            for value in case.wrong:
                assert refused(controller.update, (), {**case.options, case.option: value}) is not None
    assert controller.value == 0.1


@pytest.mark.parametrize("number", [Fraction(1, 4), 1, np.float32(0.25), np.float64(0.25), np.int64(1)], ids=repr)
def test_every_real_number_is_taken(number: Any) -> None:
    pairs = tuple(torch.randn(4, PAIRS, dtype=torch.float64))
    kinds = {"loss_type": ["sigmoid", "simpo", "bco_pair", "discopop"], "loss_weights": [number] * 4}
    lengths = {"chosen_lengths": torch.ones(PAIRS), "rejected_lengths": torch.ones(PAIRS)}
    names = ("beta", "margin", "delta", "gamma", "discopop_tau", "sft_weight", "label_smoothing")
    calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = [
        (dpo_loss, pairs, {**kinds, **lengths}, names),
        (dpo_loss, pairs, {"f_divergence": "alpha"}, ("f_alpha",)),
        (fastpref.kto_loss, (*pairs[:2], pairs[2] > 0), {}, ("kl", "beta", "desirable_weight", "undesirable_weight")),
        (pairwise_reward_loss, pairs[:2], {}, ("margin", "center_weight")),
        (fastpref.implicit_reward, pairs[:2], {}, ("beta",)),
        (fastpref.sequence_logprobs, (LOGITS, LABELS), {}, ("temperature", "logit_scale", "softcap", "ld_alpha")),
        (linear_dpo_loss, (HIDDEN, WEIGHT, LABELS), REFERENCES, ("temperature", "logit_scale", "softcap", "ld_alpha")),
    ]
    for function, arguments, options, named in calls:
        got = function(*arguments, **options, **dict.fromkeys(named, number))
        options = {name: [float(number)] * 4 if name == "loss_weights" else value for name, value in options.items()}
        torch.testing.assert_close(
            got, function(*arguments, **options, **dict.fromkeys(named, float(number))), rtol=0, atol=0
        )


@pytest.mark.parametrize("two", [2, np.float32(2), np.int64(2), Fraction(2)], ids=lambda x: type(x).__name__)
def test_every_real_number_is_taken_by_ppo(two: Any) -> None:
    rlhf = {entry.name: entry for entry in RLHF}
    for name, given, wanted in (
        ("ppo_policy_loss", {"clip": two, "dual_clip": two}, {"clip": 2.0, "dual_clip": 2.0}),
        ("ppo_policy_loss", {"clip": [two, 1]}, {"clip": (2.0, 1.0)}),
        ("ppo_loss", {"value_clip": two, "value_coef": two}, {"value_clip": 2.0, "value_coef": 2.0}),
        ("kl_shaped_rewards", {"kl_coef": two}, {"kl_coef": 2.0}),
        ("gae", {"gamma": two / 2, "lam": two / 2}, {"gamma": 1.0, "lam": 1.0}),
        ("ptx_loss", {"gamma": two, "denominator": two}, {"gamma": 2.0, "denominator": 2.0}),
    ):
        tensors, _ = rlhf[name].example(torch.Generator().manual_seed(0), PAIRS)
        for found, right in zip(*(fields(rlhf[name].function(*tensors, **x)) for x in (given, wanted)), strict=True):
            assert torch.equal(found, right)
    controller = fastpref.AdaptiveKLController(two, two, 100)
    controller.update(4 * two, two)
    assert controller.value == pytest.approx(2 * (1 + 0.2 * 2 / 100))


def test_every_integer_is_taken() -> None:
    options = {"chunk_rows": np.int64(4), "ignore_index": np.int64(3), "group_size": np.int64(2)}
    for package in (fastpref, reference):
        results = [
            package.linear_preference_loss(HIDDEN, WEIGHT, LABELS, lambda logps: logps.sum(-1), **given)
            for given in (options, {name: int(value) for name, value in options.items()})
        ]
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def vector_arguments() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any], list[str]]]:
    """Yield a name, a function, all its arguments by name, and which of them are (B,), or (S,)."""
    ones = torch.ones(PAIRS)
    pairs = {"margin": ones, "weights": ones, "chosen_lengths": ones, "rejected_lengths": ones}
    shared = {"ld_alpha": 0.5, "shared_lengths": torch.ones(2 * PAIRS, dtype=torch.long)}
    linear = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **shared}
    calls: list[tuple[str, Callable[..., Any], dict[str, Any]]] = []
    for entry in (*TABLE, *RLHF):
        drawn, options = entry.example(torch.Generator().manual_seed(0), PAIRS)
        parameters = inspect.signature(entry.function).parameters
        takes = getattr(entry, "takes", ())
        given = {name: value for name, value in pairs.items() if name in takes or (name in options and name in pairs)}
        arguments = {**dict(zip(parameters, drawn, strict=False)), **options, **given, **getattr(entry, "options", {})}
        calls += [(f"fastpref.{entry.name}", entry.function, arguments)]
    arguments = {**linear, "loss_fn": lambda logps: logps.sum(-1), "group_size": 2}
    calls += [
        ("fastpref.implicit_reward", fastpref.implicit_reward, {"logps": ones, "ref_logps": ones}),
        ("fastpref.sequence_logprobs", fastpref.sequence_logprobs, {"logits": LOGITS, "labels": LABELS, **shared}),
        ("fastpref.linear_sequence_logprobs", fastpref.linear_sequence_logprobs, linear),
        ("fastpref.linear_dpo_loss", linear_dpo_loss, {**linear, **REFERENCES, **pairs}),
        ("fastpref.linear_preference_loss", fastpref.linear_preference_loss, arguments),
    ]
    names = list(inspect.signature(nn.KTOSplitLoss.forward).parameters)[1:]
    calls += [("nn.KTOSplitLoss", nn.KTOSplitLoss(), dict.fromkeys(names, ones))]
    calls += [("nn.PairwiseRewardLoss", nn.PairwiseRewardLoss(), {"chosen": ones, "rejected": ones, "margin": ones})]
    for name, function, arguments in calls:
        vectors = [key for key, value in arguments.items() if isinstance(value, Tensor) and value.dim() == 1]
        if vectors:
            yield name, function, arguments, vectors


VECTORS = list(vector_arguments())


class TestShapes:
    """A (B, 1), which is what a reward head returns, in the place of each (B,)."""

    @pytest.mark.parametrize(
        ("function", "arguments", "vectors"), [v[1:] for v in VECTORS], ids=[v[0] for v in VECTORS]
    )
    def test_the_remedy_is_named(
        self, function: Callable[..., Any], arguments: dict[str, Any], vectors: list[str]
    ) -> None:
        function(**arguments)
        for name in vectors:
            words = rf"^{name} must be .*; got a .* of shape \(\d, 1\) .*: pass {name}\.squeeze\(-1\)$"
            with pytest.raises(ValueError, match=words):
                function(**{**arguments, name: arguments[name][:, None]})

    def test_every_loss_of_vectors_is_here(self) -> None:
        found = {(name.split(".", 1)[1].split(":")[0], vector) for name, _, _, names in VECTORS for vector in names}
        pairs = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
        of_pairs = ("margin", "weights", "chosen_lengths", "rejected_lengths")
        assert {("dpo_loss", name) for name in (*pairs, *of_pairs)} <= found
        assert {("linear_dpo_loss", name) for name in (*pairs[2:], *of_pairs)} <= found
        assert {("kto_loss", name) for name in ("policy_logps", "ref_logps", "desirable", "kl")} <= found
        assert {("pairwise_reward_loss", name) for name in ("chosen", "rejected", "margin")} <= found
        assert {("best_of_k_loss", "best"), ("kl_shaped_rewards", "scores")} <= found

    def test_the_first_argument_is_named_where_all_are_wrong(self) -> None:
        x = torch.zeros(PAIRS, 1)
        with pytest.raises(ValueError, match=r"^chosen must be \(B,\); got .*\(4, 1\).*: pass chosen\.squeeze\(-1\)$"):
            pairwise_reward_loss(x, x)
        with pytest.raises(ValueError, match=r"^policy_chosen_logps must .*: pass policy_chosen_logps\.squeeze\(-1\)$"):
            dpo_loss(x, x, x, x)
        with pytest.raises(ValueError, match=r"^policy_logps must .*: pass policy_logps\.squeeze\(-1\)$"):
            fastpref.kto_loss(x, x, x > 0, kl=0.0)

    @pytest.mark.parametrize("place", range(3))
    @pytest.mark.parametrize("function", [fastpref.ppo_value_loss, fastpref.gae])
    def test_a_value_head_gives_one_dimension_too_many(self, function: Callable[..., Any], place: int) -> None:
        count = 3 if function is fastpref.ppo_value_loss else 2
        tensors = [*torch.randn(count, 3, 4), torch.ones(3, 4, dtype=torch.bool)]
        tensors[place] = tensors[place].unsqueeze(-1)
        names = list(inspect.signature(function).parameters)
        with pytest.raises(ValueError, match=rf"^{names[place]} must be .*: pass {names[place]}\.squeeze\(-1\)"):
            function(*tensors)

    def test_no_remedy_is_made_up(self) -> None:
        x = torch.zeros(PAIRS)
        for wrong in (torch.zeros(PAIRS, 2), torch.zeros(PAIRS + 1), torch.zeros(())):
            with pytest.raises(ValueError, match=r"^rejected must be \(B,\) = \(4,\)") as caught:
                pairwise_reward_loss(x, wrong)
            assert "squeeze" not in str(caught.value)


class TestIntegers:
    """Numbers of pairs that a data set has as integers, in functions and in modules."""

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    def test_margins_and_weights(self, dtype: torch.dtype) -> None:
        pairs = tuple(torch.randn(4, PAIRS, dtype=torch.float64))
        numbers = torch.tensor([3, 0, 1, 2], dtype=dtype)
        for name in ("margin", "weights"):
            wanted = dpo_loss(*pairs, **{name: numbers.double()})
            for function in (dpo_loss, reference.dpo_loss, nn.DPOLoss()):
                torch.testing.assert_close(function(*pairs, **{name: numbers}), wanted, rtol=0, atol=0)
            results = [
                linear_dpo_loss(HIDDEN, WEIGHT, LABELS, **REFERENCES, **{name: given})
                for given in (numbers, numbers.float())
            ]
            torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        wanted = pairwise_reward_loss(*pairs[:2], margin=numbers.double())
        for function in (pairwise_reward_loss, reference.pairwise_reward_loss, nn.PairwiseRewardLoss()):
            torch.testing.assert_close(function(*pairs[:2], margin=numbers), wanted, rtol=0, atol=0)

    def test_bools_are_no_numbers(self) -> None:
        x = torch.zeros(PAIRS)
        for function in (pairwise_reward_loss, nn.PairwiseRewardLoss()):
            with pytest.raises(TypeError, match=r"^margin must be .*torch\.bool"):
                function(x, x, margin=x > 0)


class TestLayouts:
    """A sparse tensor is refused in the place of each dense one."""

    @pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
    @pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
    def test_sparse_is_refused(self, layout: torch.layout) -> None:
        calls: list[tuple[str, tuple[str, ...], tuple[Tensor, ...]]] = [
            ("token_logprobs", ("logits", "labels"), (LOGITS[0], LABELS[0])),
            ("linear_token_logprobs", ("hidden", "weight", "labels"), (HIDDEN[0], WEIGHT, LABELS[0])),
            ("ranking_loss", ("rewards", "ranks"), (torch.randn(2, 3), torch.tensor([[0, 1, 2]] * 2))),
            ("ranks_from_scores", ("scores",), (torch.randn(2, 3),)),
        ]
        if layout is torch.sparse_coo:
            calls += [("pairwise_reward_loss", ("chosen", "rejected"), (torch.randn(2), torch.randn(2)))]
        for name, names, arguments in calls:
            for i, argument in enumerate(arguments):
                if argument.dim() == 1 and layout is torch.sparse_csr:
                    continue
                sparse = (*arguments[:i], argument.to_sparse(layout=layout), *arguments[i + 1 :])
                with pytest.raises(TypeError, match=rf"^{names[i]} must be .*; got a sparse_(coo|csr)"):
                    getattr(fastpref, name)(*sparse)


@pytest.mark.parametrize(
    "parts", [[1.0], None, torch.ones(2, dtype=torch.long), torch.ones(2, 2).to_sparse()], ids=repr
)
def test_parts_that_are_no_numbers_are_refused(parts: Any) -> None:
    with pytest.raises(TypeError, match=r"^parts must be a floating-point tensor .*; got "):
        sum_parts(parts, None)


def test_a_check_does_not_depend_on_the_calls_before_it() -> None:
    """1 and True are equal, and so are tuples of them, but only one of them is a number."""
    logps = torch.randn(4, PAIRS).unbind()
    options: dict[str, Any] = {"loss_type": ("sigmoid", "hinge")}
    fastpref.dpo_loss(*logps, **options, loss_weights=(2.0, 1.0))
    with pytest.raises(TypeError, match=r"^loss_weights must be a finite number; got bool True"):
        fastpref.dpo_loss(*logps, **options, loss_weights=(2.0, True))
    fastpref.dpo_loss(*logps, beta=1.0)
    with pytest.raises(TypeError, match=r"^beta must be a finite number above 0; got bool True") as caught:
        fastpref.dpo_loss(*logps, beta=True)
    assert caught.value.__context__ is None
