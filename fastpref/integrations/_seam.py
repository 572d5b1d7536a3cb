"""Functions of another library and what takes their place, in every module of that library that holds them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version
from operator import attrgetter
from types import CodeType, ModuleType
from typing import Any, NoReturn


class Seam:
    """Where a library scores tokens.

    Args:
        library: its name, of the package and of what is installed.
        supported: the versions that are known, as pip writes them.
        places: by the module that defines them, our objects, with the names and signatures of the library's.
        users: by "module:function", the names that it must use: what calls no replaced function would not be ours.
    """

    def __init__(
        self, library: str, supported: str, places: dict[str, tuple[Any, ...]], users: dict[str, tuple[str, ...]]
    ) -> None:
        self.library, self.supported, self.places, self.users = library, supported, places, users
        self.replaced: list[tuple[ModuleType, str, Any, Any]] = []  # where, the name, the library's object, and ours

    def patch(self) -> AbstractContextManager[Any]:
        """Replace the library's objects. The exit of what is returned undoes it, unless they were replaced already."""
        undo = ExitStack()
        if not self.replaced:
            self.replaced = list(self._checked())
            for _, name, own, ours in self.replaced:
                self._exchange(name, own, ours)
            undo.callback(self.unpatch)
        return undo

    def unpatch(self) -> None:
        """Give the library its own objects back; where it is not patched, do nothing."""
        for module, name, _, ours in self.replaced:
            if getattr(module, name) is not ours:
                raise RuntimeError(f"{module.__name__}.{name} was replaced again after patch: undo that first")
        for _, name, own, ours in self.replaced:
            self._exchange(name, ours, own)
        self.replaced = []

    def _exchange(self, name: str, old: Any, new: Any) -> None:
        """Also where a module has imported the object by its name."""
        for path, module in list(sys.modules.items()):
            if path.split(".")[0] == self.library and vars(module).get(name) is old:
                setattr(module, name, new)

    def _checked(self) -> Iterator[tuple[ModuleType, str, Any, Any]]:
        from packaging.specifiers import SpecifierSet

        installed = version(self.library)
        if not SpecifierSet(self.supported).contains(installed, prereleases=True):
            self._refuse(installed, "another version")
        for path, names in self.users.items():
            unused = set(names) - set(used_names(inspect.unwrap(self._find(installed, *path.split(":"))).__code__))
            if unused:
                self._refuse(installed, f"whose {path} does not use {', '.join(sorted(unused))}")
        for path, objects in self.places.items():
            for ours in objects:
                own = self._find(installed, path, ours.__name__)
                if _signatures(own) != _signatures(ours):
                    self._refuse(installed, f"whose {path}.{ours.__name__} takes {' and '.join(_signatures(own))}")
                yield importlib.import_module(path), ours.__name__, own, ours

    def _find(self, installed: str, path: str, name: str) -> Any:
        try:
            return attrgetter(name)(importlib.import_module(path))
        except (AttributeError, ModuleNotFoundError) as error:
            # A dependency of the library that is missing is no other version of it.
            if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != self.library:
                raise
            self._refuse(installed, f"which lacks {path}.{name}")

    def _refuse(self, installed: str, found: str) -> NoReturn:
        raise NotImplementedError(
            f"fastpref knows how {self.library}{self.supported} scores tokens; installed is {installed}, {found}"
        )


def _signatures(function: Callable[..., Any] | type) -> list[str]:
    """Names, order, kinds and defaults of a function's parameters, or of a module's __init__ and forward."""
    parts: list[Any] = [function.__init__, function.forward] if isinstance(function, type) else [function]  # type: ignore[attr-defined]
    empty = inspect.Parameter.empty
    signatures = []
    for part in parts:
        parameters = inspect.signature(part).parameters.values()
        signatures.append(f"({', '.join(str(x.replace(annotation=empty)) for x in parameters)})")
    return signatures


def used_names(code: CodeType) -> Iterator[str]:
    """The global names and attributes of a function and of those within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from used_names(constant)
