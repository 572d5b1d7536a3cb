"""Replace a function of another library, after checking that it is the one that we know.

`Known` states what an integration relies on: the versions of a library, the parameters of its functions, and the names
that they use. `Known.check` raises where the installed library differs. A `Replacement` checks, puts our objects in the
place of the library's, and puts the library's back.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # the libraries depend on it, and fastpref does not
    from packaging.version import Version


@dataclasses.dataclass(frozen=True)
class Known:
    """The parts of a library that an integration relies on.

    Objects are named by "module:name", such as "trl.core:Trainer.train".

    Args:
        feature: what needs the library, for error messages, such as "FastDPOTrainer".
        library: the name of the library's package and of its distribution.
        versions: the accepted versions, such as ">=1.15,<1.17".
        tested: the versions to recommend, where `versions` has no upper bound.
        parameters: by function, its parameters in order, each "name", "name=default", or "name=..." for any default or
            none. None requires only that the object exists.
        uses: by function, the global names and attributes that its code must use. A replaced object that the library
            does not use would have no effect.
    """

    feature: str
    library: str
    versions: str
    parameters: Mapping[str, tuple[str, ...] | None]
    uses: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tested: str = ""

    def installed(self) -> Version:
        """Return the installed version of the library.

        Raises:
            ImportError: the library is not installed.
        """
        try:
            installed = version(self.library)
        except PackageNotFoundError:
            raise ImportError(
                f"{self.feature} needs {self.library}{self.versions}; found no {self.library}. "
                f"Install it: {self._command()}"
            ) from None
        from packaging.version import Version

        return Version(installed)

    def check(self) -> None:
        """Check the version of the installed library, and that its functions are as stated.

        Raises:
            ImportError: the library is not installed.
            NotImplementedError: it differs from what is stated.
        """
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(self.versions).contains(self.installed(), prereleases=True):
            raise self._error("which is another version")
        for path, names in self.uses.items():
            unused = sorted(set(names) - set(_used_names(inspect.unwrap(self.find(path)).__code__)))
            if unused:
                raise self._error(f"whose {_dotted(path)} does not use {', '.join(unused)}")
        for path, wanted in self.parameters.items():
            found = self.find(path)
            if wanted is not None and not _match(parameters(found), wanted):
                raise self._error(
                    f"whose {_dotted(path)} takes ({', '.join(parameters(found))}), not ({', '.join(wanted)})"
                )

    def find(self, path: str) -> Any:
        """Return the library's object at "module:name"; raise `NotImplementedError` if it has none."""
        module, name = path.split(":")
        try:
            found = attrgetter(name)(importlib.import_module(module))
        except (AttributeError, ModuleNotFoundError) as error:
            # A missing dependency of the library says nothing about the library's version.
            if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != self.library:
                raise
            found = None
        if found is None:
            raise self._error(f"which lacks {_dotted(path)}")
        return found

    def _error(self, problem: str) -> NotImplementedError:
        return NotImplementedError(
            f"{self.feature} needs {self.library}{self.versions}, unmodified; found {self.library} {self.installed()}, "
            f"{problem}. Install a version that it supports, {self._command()}, or train without it"
        )

    def _command(self) -> str:
        return f"pip install '{self.library}{self.tested or self.versions}'"


class _Replaced(NamedTuple):
    module: ModuleType
    name: str
    own: Any  # the library's object
    ours: Any


class Replacement:
    """Our objects in the place of a library's.

    Args:
        everywhere: whether an object is also replaced in the library's other modules that imported it by its name.
    """

    def __init__(self, *, everywhere: bool) -> None:
        self._everywhere = everywhere
        self._replaced: dict[str, _Replaced] = {}  # by path

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def ours(self, path: str) -> Any:
        """Return our object that replaces the library's at "module:name", or None if it is not replaced."""
        return self._replaced[path].ours if path in self._replaced else None

    def apply(self, known: Known, make: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[Any]:
        """Check the library, and replace its objects by those that `make` returns by "module:name".

        Returns:
            A context manager whose exit undoes this call. If the objects are replaced already, the call and the exit do
            nothing.
        """
        undo = ExitStack()
        if not self._replaced:
            known.check()
            for path, ours in make().items():
                module, name = path.split(":")
                self._replaced[path] = _Replaced(importlib.import_module(module), name, known.find(path), ours)
            for replaced in self._replaced.values():
                self._exchange(replaced, replaced.own, replaced.ours)
            undo.callback(self.undo)
        return undo

    def undo(self) -> None:
        """Put the library's objects back. If they are not replaced, do nothing.

        Raises:
            RuntimeError: something replaced one of our objects, and that replacement would be lost.
        """
        for module, name, _, ours in self._replaced.values():
            if getattr(module, name) is not ours:
                raise RuntimeError(
                    f"{module.__name__}.{name} was replaced again after patch, by {getattr(module, name)!r}; undo that "
                    "replacement first"
                )
        for replaced in self._replaced.values():
            self._exchange(replaced, replaced.ours, replaced.own)
        self._replaced = {}

    def _exchange(self, replaced: _Replaced, old: Any, new: Any) -> None:
        modules = [replaced.module]
        if self._everywhere:
            library = replaced.module.__name__.split(".")[0]
            modules = [module for path, module in list(sys.modules.items()) if path.split(".")[0] == library]
        for module in modules:
            if vars(module).get(replaced.name) is old:
                setattr(module, replaced.name, new)


def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return a function's parameters as `Known` states them: "name" or "name=default", in order."""
    empty = inspect.Parameter.empty
    return tuple(str(x.replace(annotation=empty)) for x in inspect.signature(function).parameters.values())


def parameters_of(objects: Mapping[str, Any]) -> dict[str, tuple[str, ...] | None]:
    """Return what `Known.parameters` must state for our functions and modules to replace those at the same paths."""
    stated: dict[str, tuple[str, ...] | None] = {}
    for path, ours in objects.items():
        if isinstance(ours, type):
            stated |= {f"{path}.{name}": parameters(getattr(ours, name)) for name in ("__init__", "forward")}
        else:
            stated[path] = parameters(ours)
    return stated


def _match(found: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    if len(found) != len(wanted):
        return False
    return all(
        a.split("=")[0] == b.removesuffix("=...") if b.endswith("=...") else a == b
        for a, b in zip(found, wanted, strict=True)
    )


def _dotted(path: str) -> str:
    return path.replace(":", ".")


def _used_names(code: CodeType) -> Iterator[str]:
    """Yield the global names and attributes that a function and the functions within it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _used_names(constant)
