"""bergson's collectors, end to end, on our projections: the same numbers as on its own."""

import bergson.collector.collector as collector
import pytest
import torch
from bergson import GradientProcessor, collect_gradients
from bergson.collector.gradient_collectors import GradientCollector
from bergson.config import IndexConfig
from bergson.data import load_module_gradients
from bergson.gradients import OuterProductGradients
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

import pyattr.compat.bergson
from pyattr.compat.bergson import project_global, random_matrix

SEQUENCES = [[1, 2, 3, 4, 5], [6, 7, 8], [3, 1, 4, 1], [2, 7, 1, 8, 2]]
KINDS = ["rademacher", "normal"]
theirs = {"project_global": collector.project_global, "random_matrix": collector.random_matrix}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=32, hidden_size=16, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture
def dataset():
    return Dataset.from_dict({"input_ids": SEQUENCES, "labels": SEQUENCES, "length": [len(s) for s in SEQUENCES]})


@pytest.fixture
def ours(monkeypatch):
    """Returns a switch that puts our functions into bergson's collector, and counts the calls."""
    calls = {"project_global": 0, "random_matrix": 0}

    def counted(function):
        def call(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return call

    def switch():
        monkeypatch.setattr(collector, "project_global", counted(project_global))
        monkeypatch.setattr(collector, "random_matrix", counted(random_matrix))
        return calls

    return switch


def collected(model, dataset, folder, kind, scale, target, bias=False):
    """What the collector holds after one batch of the first and the last sequence, equally long."""
    processor = GradientProcessor(
        projection_dim=24, projection_target=target, projection_type=kind, projection_scale=scale, include_bias=bias
    )
    gatherer = GradientCollector(
        model=model, cfg=IndexConfig(run_path=str(folder)), data=dataset, processor=processor, skip_index=True
    )
    tokens = torch.tensor([SEQUENCES[0], SEQUENCES[3]])
    with gatherer:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: value.clone() for name, value in gatherer.mod_grads.items()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", ["jl", "row_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_global_projection(model, dataset, tmp_path, ours, kind, scale, bias):
    expected = collected(model, dataset, tmp_path, kind, scale, "global", bias)
    calls = ours()
    got = collected(model, dataset, tmp_path, kind, scale, "global", bias)
    assert calls["project_global"] > 1
    assert list(got) == ["gradients"]
    tolerance = 1e-5 * expected["gradients"].abs().max().item()
    torch.testing.assert_close(got["gradients"], expected["gradients"], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_per_module_projection(model, dataset, tmp_path, ours, kind):
    expected = collected(model, dataset, tmp_path, kind, "jl", "per_module")
    calls = ours()
    got = collected(model, dataset, tmp_path, kind, "jl", "per_module")
    assert calls["random_matrix"] > 1
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        tolerance = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=tolerance, msg=name)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [16, 48])
def test_signs_are_theirs(m, dtype):
    got, expected = (f("x/left", m, 1000, "cpu", "rademacher", dtype) for f in (random_matrix, theirs["random_matrix"]))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals_are_theirs_to_their_rounding(dtype):
    """bergson takes the logarithm in float32: where its argument is close to 1, one entry in 50,000, that is up to 5e-5 off.

    An entry near the middle of two narrow numbers may besides round to either.
    """
    got, expected = (f("x/left", 64, 8000, "cpu", "normal", dtype) for f in (random_matrix, theirs["random_matrix"]))
    assert got.dtype == expected.dtype == dtype
    difference = (got.double() - expected.double()).abs() - torch.finfo(dtype).eps * expected.double().abs()
    assert difference.max() < 1e-4
    assert (difference > 2e-6).double().mean() < 1e-4


def test_blocks_are_theirs_at_their_size():
    """2^27 / 2^14 = 8192 columns a block, of 10,000."""
    x = torch.randn(2, 10_000)
    m = 1 << 14
    got, expected = (f("layer/single", x, m, "rademacher") for f in (project_global, theirs["project_global"]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_outer_product_gradients(kind):
    torch.manual_seed(1)
    factors = OuterProductGradients(
        torch.randn(3, 6, 20), torch.randn(3, 6, 30), torch.randn(3, 20), torch.randn(30), torch.rand(20, 30) + 0.5
    )
    got, expected = (f("layer/single", factors, 40, kind) for f in (project_global, theirs["project_global"]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_usage_example(model, dataset, tmp_path, monkeypatch, run_example):
    """The index is the one that bergson makes with its own projection."""
    monkeypatch.setattr(collector, "project_global", collector.project_global)  # the example replaces it

    def written(name, collect):
        cfg = IndexConfig(
            run_path=str(tmp_path / name), token_batch_size=64, projection_dim=512, projection_target="global"
        )
        collect(cfg)
        return torch.from_numpy(load_module_gradients(cfg.partial_run_path)["gradients"].copy())

    processor = GradientProcessor(projection_dim=512, projection_target="global")
    expected = written("theirs", lambda cfg: collect_gradients(model=model, data=dataset, processor=processor, cfg=cfg))
    got = written("ours", lambda cfg: run_example(pyattr.compat.bergson, model=model, data=dataset, cfg=cfg))
    assert collector.project_global is project_global
    assert expected.shape == (len(dataset), 512)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
