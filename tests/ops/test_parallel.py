"""CPU kernels beside torch's own threads, from several Python threads at once, and in forked children."""

import multiprocessing
import subprocess
import sys
import threading
import time

import pytest
import torch

from pyattr import testing
from pyattr.ops import rademacher_project

pytestmark = pytest.mark.skipif(
    "cpu" not in testing.usable_backends("rademacher_project"), reason="the cpu backend is not built"
)


def project(seed=0):
    return rademacher_project(testing.make_gradients(5, 3000, seed=seed), 300, backend="cpu")


def _send_projection(connection):
    connection.send_bytes(project().numpy().tobytes())


def test_a_forked_child_computes_the_same_after_the_parent_used_threads():
    """GNU OpenMP's pool does not survive a fork: a child that entered a parallel region would wait for ever."""
    torch.set_num_threads(2)
    expected = project().numpy().tobytes()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send_projection, args=(sender,))
    child.start()
    try:
        assert receiver.poll(60), "the forked child hangs"
        assert receiver.recv_bytes() == expected
    finally:
        child.kill()
        child.join()


FORK_FIRST = """
import os, signal, sys, torch
{imports}
torch.set_num_threads(2)
torch.randn(500, 500) @ torch.randn(500, 500)  # starts the pool of threads that the child will lack
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that hangs dies
    from pyattr import testing
    from pyattr.ops import rademacher_project
    rademacher_project(testing.make_gradients(5, 3000), 300, backend="cpu").numpy().tofile(sys.argv[1])
    os._exit(0)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@pytest.mark.parametrize("imports", ("import pyattr", "import pyattr.ops"))
def test_a_forked_child_may_be_the_first_to_project(imports, tmp_path):
    """The extension is loaded by the first op: a fork before that must be known to it all the same."""
    program = FORK_FIRST.format(imports=imports)
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"the forked child hangs or fails: {done.stderr}"
    assert (tmp_path / "out").read_bytes() == project().numpy().tobytes()


def test_other_python_threads_run_meanwhile():
    """The lock is released in a call: a thread ticks in the middle of it, not only before and after."""
    torch.set_num_threads(1)
    grads, ticks, done = testing.make_gradients(64, 50_000), [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    clock = threading.Thread(target=tick)
    clock.start()
    try:
        start = time.perf_counter()
        rademacher_project(grads, 4096, backend="cpu")
        seconds = time.perf_counter() - start
    finally:
        done.set()
        clock.join()
    assert [t for t in ticks if start + seconds / 4 < t < start + seconds * 3 / 4]


def test_python_threads_at_once():
    expected = [project(seed) for seed in range(4)]
    results = [None] * 4

    def work(seed):
        torch.randn(200, 200) @ torch.randn(200, 200)  # torch's own OpenMP region in the same thread
        results[seed] = project(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
