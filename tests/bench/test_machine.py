"""The folder of a kind of machine, and what its ceilings are."""

import pytest

from bench import machine

EPYC = """\
processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: {model}
model name	: {name}
stepping	: 1
"""


@pytest.mark.parametrize(
    ("model", "name", "kind", "slug"),
    [
        (1, "AMD EPYC", "zen3", "2-core-amd-epyc-zen3-avx2"),
        (17, "AMD EPYC 9R14 Processor", "zen4", "2-core-amd-epyc-9r14-zen4-avx2"),
        (300, "AMD EPYC", None, "2-core-amd-epyc-avx2"),
    ],
)
def test_slug_from_cpuinfo(model, name, kind, slug):
    found = machine.cpu(EPYC.format(model=model, name=name))
    assert (found["name"], found["kind"]) == (name, kind)
    assert machine.slug(2, found["name"], found["kind"], "avx2", []) == slug


def test_slug_drops_what_varies_and_names_each_gpu_once():
    name = "Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz"
    gpus = ["NVIDIA H200", "NVIDIA H200"]
    assert machine.slug(16, name, "sapphirerapids", "avx512", gpus) == (
        "16-core-intel-xeon-platinum-8488c-sapphirerapids-avx512-nvidia-h200"
    )


def test_cpuinfo_without_the_fields_is_no_error():
    assert machine.cpu("Hardware : something")["kind"] is None


def test_no_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert machine.measure_ceilings() == {"not_measured": "no C++ compiler: /nowhere/c++"}


def test_a_compiler_that_fails_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert machine.measure_ceilings()["not_measured"].startswith("false failed")
