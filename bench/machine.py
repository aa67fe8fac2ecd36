"""Which machine this is, what it can do at most, and which code is on it."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pyattr import backends

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "pyattr", "triton_kernels", "bench", "setup.py", "CMakeLists.txt", "pyproject.toml")
NOT_SOURCES = (":!bench/results", ":!*.md")

# Clouds hide the product's number, so the kind of core is read from (vendor, family, model).
_MICROARCHITECTURES = [
    ("AuthenticAMD", 23, range(0x00, 0x30), "zen"),
    ("AuthenticAMD", 23, range(0x30, 0x100), "zen2"),
    ("AuthenticAMD", 25, range(0x00, 0x10), "zen3"),
    ("AuthenticAMD", 25, range(0x10, 0x20), "zen4"),
    ("AuthenticAMD", 25, range(0x20, 0x60), "zen3"),
    ("AuthenticAMD", 25, range(0x60, 0x100), "zen4"),
    ("AuthenticAMD", 26, range(0x00, 0x100), "zen5"),
    ("GenuineIntel", 6, (0x55,), "skylake-cascadelake"),
    ("GenuineIntel", 6, (0x6A, 0x6C), "icelake"),
    ("GenuineIntel", 6, (0x8F,), "sapphirerapids"),
    ("GenuineIntel", 6, (0xCF,), "emeraldrapids"),
    ("GenuineIntel", 6, (0xAD, 0xAE), "graniterapids"),
]


def cpu(cpuinfo: str | None = None) -> dict:
    """Vendor, name, family, model and kind of core, from the text of /proc/cpuinfo."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text()
        except OSError:
            cpuinfo = f"model name : {platform.processor() or platform.machine()}"

    def field(name, default):
        found = re.search(rf"^{name}\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
        return found.group(1).strip() if found else default

    vendor, name = field("vendor_id", ""), field("model name", platform.machine())
    family, model = int(field("cpu family", "0")), int(field("model", "0"))
    kind = next((k for v, f, ms, k in _MICROARCHITECTURES if (v, f) == (vendor, family) and model in ms), None)
    return {"vendor": vendor, "name": name, "family": family, "model": model, "kind": kind}


def slug(cores: int, name: str, kind: str | None, simd: str, gpus: list[str]) -> str:
    """The folder of a kind of machine, such as ``2-core-amd-epyc-zen3-avx2``."""
    name = re.sub(r"\((R|TM|r|tm)\)|@.*|\bCPU\b|\bProcessor\b", " ", name)
    text = " ".join([f"{cores}-core", name, kind or "", simd, *dict.fromkeys(gpus)])
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def simd_level() -> str:
    """The CPU kernels' level on this machine, or "none" without the compiled module."""
    module = backends.extension()
    return "none" if isinstance(module, str) else module.simd_level()


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else 4 << 30


def git(*arguments: str) -> str:
    """What git prints, or an empty string outside a checkout."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Twelve digits of HEAD, with "-dirty" when the sources differ from it."""
    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--", *SOURCES, *NOT_SOURCES)
    return f"{head}-dirty" if changed else head


def measure_ceilings() -> dict:
    """Adds and fused multiply-adds per second, bytes read from memory per second; or why they were not measured."""
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "ceilings"))
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-std=c++17"]
        try:
            command = [compiler, *flags, str(ROOT / "bench" / "ceilings.cpp"), "-o", program]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
        except FileNotFoundError:
            return {"not_measured": f"no C++ compiler: {compiler}"}
        except subprocess.CalledProcessError as error:
            return {"not_measured": f"{error.cmd[0]} failed: {error.stderr.strip()[-300:]}"}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("pyattr", "torch", "numpy", "triton", "scikit-learn", "diffusers", "opacus"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[str]:
    """Names of the CUDA devices."""
    return (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def describe() -> dict:
    """Everything that a recorded run says of its machine, except the ceilings."""
    processor = cpu()
    return {
        "slug": slug(cores(), processor["name"], processor["kind"], simd_level(), gpus()),
        "cpu": processor,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "simd": simd_level(),
        "gpus": gpus(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    json.dump({**describe(), "ceilings": measure_ceilings()}, sys.stdout, indent=2)
    print()
