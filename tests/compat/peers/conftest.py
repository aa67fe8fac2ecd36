"""What the tests with the peers share."""

import inspect

import pytest


@pytest.fixture
def run_example():
    """Runs the indented lines of a module's docstring among the given names, and returns the names afterwards."""

    def run(module, **names):
        lines = inspect.getdoc(module).splitlines()
        code = "\n".join(line[4:] for line in lines if line.startswith("    "))
        exec(compile(code, module.__name__, "exec"), names)
        return names

    return run
