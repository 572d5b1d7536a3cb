"""The options of the public functions, in named tuples that are created once and passed on whole."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from fastpref._core.checks import REDUCTIONS, check_choice, check_ld, check_mode

_Bundle = TypeVar("_Bundle", bound=tuple[Any, ...])


def by_name(bundle: tuple[Any, ...]) -> dict[str, Any]:
    """Return the fields of a named tuple by name, as `_asdict` does, which Dynamo cannot trace in torch 2.8."""
    names: tuple[str, ...] = type(bundle)._fields  # type: ignore[attr-defined]
    return dict(zip(names, bundle, strict=True))


def replaced(bundle: _Bundle, **fields: Any) -> _Bundle:
    """Return a named tuple with other values in some of its fields.

    `_replace` does the same, and Dynamo cannot trace it in torch 2.8.
    """
    return type(bundle)(*{**by_name(bundle), **fields}.values())


class Reduction(NamedTuple):
    """How the log-probs of tokens become those of sequences.

    Attributes:
        name: "none" leaves them as they are; "sum"; or "mean", over a sequence's scored tokens.
        ld_alpha: α of LD-DPO (arXiv 2409.06411), or None.
        shared_lengths: (S,), with `ld_alpha`: the number of scored tokens of each sequence that have weight 1; or None.
    """

    name: str
    ld_alpha: float | None = None
    shared_lengths: Tensor | None = None

    @classmethod
    def checked(cls, name: str, ld_alpha: float | None, shared_lengths: Tensor | None) -> Reduction:
        """Return the reduction of sequences, or raise `TypeError` or `ValueError` for a wrong option."""
        check_choice("reduction", name, REDUCTIONS[1:])
        return cls(name, check_ld(ld_alpha, shared_lengths), shared_lengths)


# Tokens are not reduced.
TOKENS = Reduction("none")


class LinearOptions(NamedTuple):
    """How log-probs from hidden states are computed; none of these options changes an exact result.

    Attributes:
        mode: "auto", "save" or "recompute".
        chunk_rows: the most rows of a tile of logits, or None.
        filter_eps: the softmax mass below which columns are left out of a gradient; None for an exact gradient.
    """

    mode: str = "auto"
    chunk_rows: int | None = None
    filter_eps: float | None = None

    def checked(self) -> LinearOptions:
        """Return the options as an int and a float, or raise `TypeError` or `ValueError` for a wrong one."""
        if self.chunk_rows is None and self.filter_eps is None and isinstance(self.mode, str) and self.mode == "auto":
            return self
        return LinearOptions(self.mode, *check_mode(self.mode, self.chunk_rows, self.filter_eps))
