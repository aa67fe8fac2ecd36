"""What is timed: a call in this process (CPU clock or CUDA events), or a worker in a process of its own."""

import atexit
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

WORKER = Path(__file__).with_name("worker.py")


class ContenderError(RuntimeError):
    """A worker failed; the message carries what it said."""


class Here:
    """A call in this process. ``device`` "cuda" times with events on the current stream."""

    def __init__(self, call: Callable, device: str = "cpu"):
        self.call, self.device = call, device

    def first(self):
        """The answer and the seconds of the first run, which is also the warm-up."""
        started = time.perf_counter()
        answer = self.call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return answer, time.perf_counter() - started

    def round(self) -> float:
        """Seconds of one more run."""
        if self.device != "cuda":
            started = time.perf_counter()
            self.call()
            return time.perf_counter() - started
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3


class Process:
    """A running bench/worker.py under some interpreter and environment.

    Args:
        python: the interpreter that holds the contenders.
        environment: variables set on top of this process's.
        seconds: how long one reply may take.
    """

    def __init__(self, python, environment=None, seconds=300.0):
        self.seconds = seconds
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [str(python), str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, **request) -> dict:
        """Send a request, wait for its reply."""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._process.stdout], [], [], self.seconds)
        except BrokenPipeError:
            ready = [self._process.stdout]
        if not ready:
            self._process.kill()
            raise ContenderError(f"the worker gave no answer within {self.seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(timeout=10)
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip()[-500:]
            raise ContenderError(f"the worker ended with status {self._process.returncode}: {said}")
        reply = json.loads(line)
        if "error" in reply:
            raise ContenderError(reply["error"])
        return reply

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End it."""
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended first
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


_PROCESSES: dict[tuple, Process] = {}


def process(python, environment: dict[str, str]) -> Process:
    """The one process with this interpreter and environment: a peer's imports can take ten seconds, so it is kept."""
    key = (str(python), *sorted(environment.items()))
    if key in _PROCESSES and not _PROCESSES[key].alive:
        _PROCESSES.pop(key).close()
    if key not in _PROCESSES:
        _PROCESSES[key] = Process(python, environment)
    return _PROCESSES[key]


@atexit.register
def close_all() -> None:
    """End every kept process."""
    while _PROCESSES:
        _PROCESSES.popitem()[1].close()


class Worker:
    """A contender of bench/worker.py; it times itself.

    Args:
        contender: its name in worker.py.
        inputs: [B, P] float32.
        process: where it runs.
        arguments: passed on to the contender.
    """

    def __init__(self, contender: str, inputs: torch.Tensor, process: Process, **arguments):
        self.contender, self.inputs, self.process, self.arguments = contender, inputs, process, arguments
        self.about: dict = {}

    def first(self):
        """The answer and the seconds of the first run."""
        with tempfile.TemporaryDirectory() as folder:
            inputs, output = Path(folder, "inputs.npy"), Path(folder, "output.npy")
            np.save(inputs, self.inputs.numpy())
            self.about = self.process.ask(
                do="prepare",
                contender=self.contender,
                inputs=str(inputs),
                output=str(output),
                threads=torch.get_num_threads(),
                **self.arguments,
            )
            return torch.from_numpy(np.load(output)), self.about.pop("seconds")

    def round(self) -> float:
        """Seconds of one more run."""
        return self.process.ask(do="round")["seconds"]
