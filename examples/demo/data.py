"""Ranked answers, built from the functions of the Python standard library or from a user's pairs."""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"})
BODY_LINES = 4
PROMPT_END = '\n"""'
DOCSTRING_WORDS = (4, 40)


@dataclass(frozen=True)
class Function:
    """One function of a module.

    Attributes:
        module: its top-level module, such as `json`.
        prompt: its signature and the first lines of its body, without the docstring.
        docstring: the first paragraph of its docstring, on one line.
        code: the line of its body that follows the prompt.
    """

    module: str
    prompt: str
    docstring: str
    code: str


@dataclass(frozen=True)
class Example:
    """A prompt and K answers, best first, so that the rank of an answer is its index.

    Attributes:
        prompt: the text before an answer.
        answers: K texts.
        group: a module or a prompt; training and held-out examples have no group in common.
    """

    prompt: str
    answers: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Dataset:
    """Training and held-out examples.

    Attributes:
        kinds: the name of each rank, K of them.
        train: examples to train on.
        held_out: examples of other groups.
        group: "module" or "prompt", the kind of the groups.
    """

    kinds: tuple[str, ...]
    train: list[Example]
    held_out: list[Example]
    group: str

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (better, worse) pairs of ranks."""
        return [(i, j) for i in range(len(self.kinds)) for j in range(i + 1, len(self.kinds))]

    def pair_name(self, pair: tuple[int, int]) -> str:
        """Return the name of a pair of ranks, such as `own > code`."""
        return f"{self.kinds[pair[0]]} > {self.kinds[pair[1]]}"


# The best answer says in prose what the function does. Next is prose about another function, then the right words in
# an order that nobody can read, and last the next line of code, which a language model would have written anyway.
ANSWERS = ("own", "other", "shuffled", "code")


def stdlib_functions(root: Path | None = None) -> list[Function]:
    """Return the documented functions under `root`, in the order of path and line.

    The default of `root` is the standard library of this Python. Functions without a line of body, or whose docstring
    has too few or too many words, are left out. Each docstring is used once, so that no held-out answer was trained on.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    functions, seen = [], set()
    for path in _sources(root):
        for function in _functions_of(path, path.relative_to(root)):
            if function.docstring not in seen:
                seen.add(function.docstring)
                functions.append(function)
    return functions


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _functions_of(path: Path, relative: Path) -> Iterator[Function]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        # The library has a few templates, and files in other encodings.
        return
    lines = source.splitlines()
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        function = _function(node, lines, relative.parts[0].removesuffix(".py"))
        if function is not None:
            yield function


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str], module: str) -> Function | None:
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    words = docstring.strip().split("\n\n")[0].split()
    signature = lines[node.lineno - 1 : node.body[0].lineno - 1]
    body = [line for line in lines[node.body[0].end_lineno : node.end_lineno] if line.strip()]
    if not DOCSTRING_WORDS[0] <= len(words) <= DOCSTRING_WORDS[1] or words[0] == ">>>" or not signature or not body:
        return None
    shown = min(BODY_LINES, len(body) - 1)
    prompt = textwrap.dedent("\n".join([*signature, *body[:shown]]))
    return Function(module, prompt + PROMPT_END, " ".join(words), body[shown].strip())


def rank_answers(functions: Sequence[Function], rng: random.Random, draws: int = 1) -> list[Example]:
    """Return `draws` examples of every function, each with another function's docstring and a shuffle drawn for it.

    The other docstring comes from another module of `functions` if there is one.
    """
    modules = {function.module for function in functions}
    examples = []
    for _ in range(draws):
        for function in functions:
            other = rng.choice(functions)
            while other is function or (other.module == function.module and len(modules) > 1):
                other = rng.choice(functions)
            answers = (function.docstring, other.docstring, shuffle_words(function.docstring, rng), function.code)
            examples.append(Example(function.prompt, answers, function.module))
    return examples


def shuffle_words(text: str, rng: random.Random) -> str:
    """Return `text` with its words in another order, or `text` itself if there is no other order."""
    words = text.split()
    shuffled = words[:]
    while shuffled == words and len(set(words)) > 1:
        rng.shuffle(shuffled)
    return " ".join(shuffled)


def split_groups(groups: Sequence[str], fraction: float, rng: random.Random) -> set[str]:
    """Draw whole groups to hold out, until `fraction` of the examples is held out; never all of the groups."""
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise ValueError(f"holding out examples takes at least two different groups; got {sorted(sizes)}")
    # Holding out a package that makes up much of the library (tkinter) would leave too little to train on.
    small = [name for name in sorted(sizes) if sizes[name] <= fraction * len(groups) / 2]
    names = rng.sample(small, len(small)) or [min(sorted(sizes), key=lambda name: sizes[name])]
    held_out, count = set(), 0
    for name in names:
        if count < fraction * len(groups) and len(held_out) < len(sizes) - 1:
            held_out.add(name)
            count += sizes[name]
    return held_out


def stdlib_dataset(*, held_out: float, seed: int, draws: int = 1, limit: int | None = None) -> Dataset:
    """Return ranked answers for the standard library of this Python, split by module.

    Args:
        held_out: the share of the functions to hold out, whole modules at a time.
        seed: the seed of the split, the other docstrings and the shuffles.
        draws: the number of training examples per function; a held-out function gets one.
        limit: the number of functions to use, spread evenly over the library; None for all.
    """
    functions = stdlib_functions()
    if limit is not None and limit < len(functions):
        functions = [functions[i * len(functions) // limit] for i in range(limit)]
    rng = random.Random(seed)
    apart = split_groups([function.module for function in functions], held_out, rng)
    return Dataset(
        kinds=ANSWERS,
        train=rank_answers([function for function in functions if function.module not in apart], rng, draws),
        held_out=rank_answers([function for function in functions if function.module in apart], rng),
        group="module",
    )


def pairs_dataset(examples: Sequence[Example], *, held_out: float, seed: int) -> Dataset:
    """Return a user's (chosen, rejected) pairs, split by prompt."""
    apart = split_groups([example.group for example in examples], held_out, random.Random(seed))
    return Dataset(
        kinds=("chosen", "rejected"),
        train=[example for example in examples if example.group not in apart],
        held_out=[example for example in examples if example.group in apart],
        group="prompt",
    )
