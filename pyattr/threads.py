"""How many threads a CPU kernel may use in this process."""

import os

_forked = False


def _after_fork_in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # where processes can fork
    os.register_at_fork(after_in_child=_after_fork_in_child)


def usable(wanted: int) -> int:
    """``wanted``, but 1 in a process forked since pyattr was imported.

    GNU OpenMP's thread pool, which torch shares, does not survive a fork: a parallel region of more than one thread would wait
    for it for ever. The extension has the same guard, but is loaded by the first op, which may come after the fork.
    """
    return 1 if _forked else wanted
