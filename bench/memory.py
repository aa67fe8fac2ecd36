"""The most memory that a contender takes, in a process of its own."""

import subprocess
import sys
from collections.abc import Callable

from .machine import ROOT


def peak_mib(module: str, *arguments: str) -> dict[str, float]:
    """What ``python -m bench.MODULE ARGUMENTS`` prints at its end: the MiB that one call took beside its inputs."""
    if not sys.platform.startswith("linux"):
        return {}
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"peak_mib": float(printed.split()[-1])}


def print_peak(call: Callable[[], object]) -> None:
    """Run the call and print the MiB by which the resident memory has at most grown meanwhile."""
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak starts anew from here
    before = _resident("VmRSS")
    call()
    print(f"{_resident('VmHWM') - before:.1f}")


def _resident(field: str) -> float:
    """A line of this process's status, MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))
