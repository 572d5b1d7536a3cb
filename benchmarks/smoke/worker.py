"""Run the process that judges cases one after another."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

START_SECONDS = 120.0
PATIENCE = 5.0  # seconds that a killed process is given to end


class Answer(NamedTuple):
    """Hold the verdict on a case.

    Attributes:
        name: the case.
        status: PASS, FAIL or SKIP.
        text: the error and the allowance, the fault, or the reason.
        broken: whether the process can judge no other case, because its device does not work any more.
    """

    name: str
    status: str
    text: str
    broken: bool = False


class LostError(RuntimeError):
    """Raised if the process died or did not answer in time."""


def serve(pipe: Connection, device: str) -> None:
    """Send the names of the cases, the name of the device and its target, then judge each case that is asked for."""
    # Ctrl-C ends the parent, which closes its end of the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from benchmarks.smoke.cases import every_case
    from benchmarks.triton_on_cpu import launchers_on_cpu

    warnings.simplefilter("ignore")  # NumPy and the deterministic mode warn about values that the cases hold on purpose
    # Every `torch.empty` holds NaN, so that an element that no kernel writes is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    route: AbstractContextManager[None] = nullcontext()
    if device == "cpu":
        torch.set_num_threads(1)
        route = launchers_on_cpu()
    with route:
        cases = {case.name: case for case in every_case(device)}
        pipe.send((list(cases), *_describe(device)))
        while True:
            try:
                name = pipe.recv()
            except EOFError:
                return
            pipe.send(cases[name].judge(device))


def _describe(device: str) -> tuple[str, Any]:
    """Return the device in words, and Triton's target for it, None under the interpreter."""
    import torch
    import triton

    from benchmarks.precompile import target_of

    name = "Triton's interpreter" if device == "cpu" else torch.cuda.get_device_name()
    target = None if device == "cpu" else target_of(device)
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}", target


class Worker:
    """A process that judges cases.

    Attributes:
        names: the names of its cases, the most telling first.
        description: its device and its libraries.
        target: the target that Triton compiles for on that device, None under the interpreter.
    """

    names: list[str]
    description: str
    target: Any

    def __init__(self, device: str, target: Callable[[Connection, str], None] = serve) -> None:
        """Start the process.

        Raises:
            LostError: it died, or did not start in time.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, device), daemon=True)
        self._process.start()
        theirs.close()
        self.names, self.description, self.target = self._answer(START_SECONDS)

    def judge(self, name: str, seconds: float) -> Answer:
        """Judge a case.

        Raises:
            LostError: the process died, or did not answer within `seconds`.
        """
        return self._answer(seconds, name)

    def _answer(self, seconds: float, name: str | None = None) -> Any:
        try:
            if name is not None:
                self._pipe.send(name)
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(PATIENCE)
            raise LostError(f"the process died, with exit code {self._process.exitcode}") from None
        self.stop()
        raise LostError(f"no answer in {seconds:.0f} s")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join(PATIENCE)  # a driver may keep the process from ever ending
        self._pipe.close()
