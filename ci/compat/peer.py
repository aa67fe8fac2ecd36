"""What is said of a peer: what to install, which of its tests to run, and how they are turned to our stand-in."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Adapted:
    """A test file of the peer's source distribution, and what is changed in it."""

    path: str
    """Inside the source distribution: "tests/test_jl.py"."""

    edits: tuple[tuple[str, str], ...] = ()
    """(text, what stands in its place), in order, at every occurrence; a text that does not occur is an error."""

    left_out: dict[str, str] = field(default_factory=dict)
    """Test functions ("test_x" or "TestClass.test_x") that are not run, and why; one that is not there is an error."""


@dataclass(frozen=True)
class Peer:
    """A file of its own in ci/compat/peers, whose name is that of the stand-in in pyattr.compat.

    Beside it may lie ``ci/compat/patches/<name>.py``: the conftest of the adapted tests, which puts our functions where the
    peer's are. Our own test with the peer is ``tests/compat/peers/test_<name>.py``.
    """

    distribution: str
    """Pinned, "traker==0.3.2": what is installed (without its dependencies) and whose source distribution has the tests."""

    packages: tuple[str, ...] = ()
    """What the peer and the tests import, beside torch and pytest: installed with their dependencies."""

    tests: tuple[Adapted, ...] = ()

    skipped: int = 0
    """How many of its tests skip themselves where there is no GPU; more of them fail the run."""

    installed: bool = True
    """False for a peer that cannot be built without nvcc: our stand-in takes its name, and only its tests are fetched."""

    environment: str | None = None
    """The peer whose environment this one shares; its packages must be among that one's."""
