"""Run cases in several processes, so that kernels compile in parallel and a crash ends one case only."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fastpref.cli.check.run import Result, chosen_cases, name_of, run
from fastpref.cli.device import works
from fastpref.testing.case import Case

PATIENCE = 5.0  # seconds to wait for a killed process to end
Job = tuple[Case, torch.device, torch.dtype]


def in_processes(jobs: Sequence[Job], processes: int) -> Iterator[list[Result]]:
    """Yield the results of each job as it ends.

    If a process ends during a job, the job gives one result that says so, and a new process takes the next job.
    """
    left = deque(jobs)
    workers = [_Worker(processes) for _ in range(min(processes, len(left)))]
    try:
        for worker in workers:
            worker.give(left.popleft())
        busy = {worker.pipe: worker for worker in workers}
        while busy:
            for pipe in wait(list(busy)):
                worker = busy.pop(pipe)  # type: ignore[arg-type]
                yield worker.results()
                if left:
                    worker.give(left.popleft())
                    busy[worker.pipe] = worker
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that runs one job after another, and its current job."""

    def __init__(self, processes: int) -> None:
        self._threads = max(1, torch.get_num_threads() // processes)
        self._start()

    def _start(self) -> None:
        # A forked process cannot use CUDA once its parent has.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._threads), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        """Start a job."""
        self._job = case, device, dtype = job
        self.pipe.send((case.name, str(device), dtype))

    def results(self) -> list[Result]:
        """Receive the results of the current job, and start a new process if this one can run no more jobs."""
        case, device, dtype = self._job
        fields: dict[str, Any] = {"case": case, "device": str(device), "dtype": name_of(dtype)}
        try:
            found, usable = self.pipe.recv()
            results = [Result(**fields, **result) for result in found]
        except (EOFError, ConnectionError):
            self._process.join()
            code, usable = self._process.exitcode or 0, False
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            results = [Result(**fields, output="", fault=f"it ended its process ({how})")]
        if not usable:
            self.end()
            self._start()
        return results

    def end(self) -> None:
        """End the process."""
        self.pipe.close()
        self._process.kill()
        self._process.join(PATIENCE)  # a process that is stuck in a driver may never end


def _serve(pipe: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    torch.set_num_threads(threads)
    cases = {case.name: case for case in chosen_cases(None)}
    while True:
        try:
            name, device, dtype = pipe.recv()
        except EOFError:
            return
        results = run(cases[name], torch.device(device), dtype)
        # After some errors a device fails every later call in the same process.
        usable = all(result.fault is None for result in results) or works(device)
        fields = ("output", "error", "allowance", "fault")
        pipe.send(([{field: getattr(result, field) for field in fields} for result in results], usable))
