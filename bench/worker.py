"""One contender in a process of its own: does what it is told over a pipe and times itself here.

Started as a plain script by any interpreter that holds the contender, with one JSON object per line in and out. Inputs come
as .npy files. Times are of the contender's own call: neither loading nor the pipe is in them.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import types

_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _HERE]  # our file names are not modules

import numpy as np  # noqa: E402
import torch  # noqa: E402


def pyattr(x, proj_dim, kind, seed, backend="cpu"):
    """Our own op at the level that PYATTR_SIMD sets for this process."""
    from pyattr import ops

    project = getattr(ops, f"{kind}_project")
    return lambda: project(x, proj_dim, seed=seed, backend=backend)


def sparse(x, proj_dim, nonzeros, seed):
    """Our sparse projection at the level that PYATTR_SIMD sets for this process."""
    from pyattr import ops

    return lambda: ops.sparse_project(x, proj_dim, nonzeros=nonzeros, seed=seed, backend="cpu")


_THEIR_NAMES = {"rademacher": "rademacher", "gaussian": "normal"}


def trak(x, proj_dim, kind, seed, block_size=100):
    """TRAK's projector for machines without a GPU; it holds ``block_size`` rows of its matrix at a time."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        x.shape[1], proj_dim, seed, ProjectionType(_THEIR_NAMES[kind]), torch.device("cpu"), block_size
    )
    return lambda: projector.project(x, model_id=0)


def dattri(x, proj_dim, kind, seed):
    """dattri's random_project; scales by 1 / sqrt(D)."""
    from dattri.func.projection import random_project

    project = random_project(x, x.shape[0], proj_dim, 32, seed, _THEIR_NAMES[kind], device="cpu")
    return lambda: project(x, ensemble_id=0)


def bergson(x, proj_dim, kind, seed):
    """bergson's global projection; scales by 1 / sqrt(D).

    Importing the bergson package imports its training stack too; a bare package with the same path imports this part alone.
    """
    if "bergson" not in sys.modules:
        package = types.ModuleType("bergson")
        package.__path__ = list(importlib.util.find_spec("bergson").submodule_search_locations)
        package.__version__ = importlib.metadata.version("bergson")
        sys.modules["bergson"] = package
    from bergson.collector.collector import project_global

    return lambda: project_global(bergson_identifier(seed), x, proj_dim, _THEIR_NAMES[kind])


def bergson_identifier(seed: int) -> str:
    """The name of bergson's matrix for a seed."""
    return f"layer/single/seed{seed}"


def bergson_key(identifier: str) -> tuple[int, int]:
    """Our (seed, stream) for a bergson matrix: the first eight bytes of the name's MD5, little endian."""
    digest = hashlib.md5(identifier.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


CONTENDERS = {"pyattr": pyattr, "sparse": sparse, "trak": trak, "dattri": dattri, "bergson": bergson}
DISTRIBUTIONS = {"pyattr": "pyattr", "sparse": "pyattr", "trak": "traker", "dattri": "dattri", "bergson": "bergson"}


def prepare(contender: str, inputs: str, output: str, threads: int, **arguments) -> tuple[dict, object]:
    """Load, run once, save the answer; what was run, and the call to repeat."""
    torch.set_num_threads(threads)
    x = torch.from_numpy(np.load(inputs))  # [B, P]
    run = CONTENDERS[contender](x, **arguments)
    started = time.perf_counter()
    answer = run()
    seconds = time.perf_counter() - started
    np.save(output, answer.numpy())
    version = importlib.metadata.version(DISTRIBUTIONS[contender])
    return {"seconds": seconds, "version": version, "torch": torch.__version__, "numpy": np.__version__}, run


def serve(requests, replies) -> None:
    """Answer "prepare" and "round" until the requests end."""
    run = None
    for line in requests:
        request = json.loads(line)
        try:
            if request.pop("do") == "prepare":
                reply, run = prepare(**request)
            else:
                started = time.perf_counter()
                run()
                reply = {"seconds": time.perf_counter() - started}
        except Exception as error:  # told to the other side, which raises it there
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    # What a library prints goes to stderr: stdout carries the replies alone.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(sys.stdin, channel)
