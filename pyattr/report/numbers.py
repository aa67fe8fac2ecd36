"""Results as JSON: what people read, rounded."""

from __future__ import annotations

import json
import os

import numpy as np

from ..evaluation import Comparison, PairedComparison, Share
from ..files import whole_file


def numbers(x) -> object:
    """JSON of results: shares and tests as dicts, arrays as lists, floats to five digits, NaN as null."""
    if isinstance(x, Share):
        return {"percent": numbers(100 * x.value), "of": x.of, "interval": numbers([100 * x.low, 100 * x.high])}
    if isinstance(x, Comparison):
        return {"p": numbers(x.p_value), "effect": numbers(x.effect), "counts": list(x.counts)}
    if isinstance(x, PairedComparison):
        return {name: numbers(getattr(x, name)) for name in ("effect", "difference", "count")} | {
            "p": numbers(x.p_value)
        }
    if isinstance(x, dict):
        return {name: numbers(value) for name, value in x.items()}
    if isinstance(x, np.ndarray) and x.ndim == 0:
        return numbers(x[()])
    if isinstance(x, (list, tuple, np.ndarray)):
        return [numbers(value) for value in x]
    if isinstance(x, (float, np.floating)):
        return None if np.isnan(x) else float(f"{x:.5g}")
    return int(x) if isinstance(x, np.integer) else x


def write_results(path: str | os.PathLike, found: dict) -> None:
    """Write results as JSON, whole or not at all."""
    with whole_file(path) as stream:
        stream.write(json.dumps(numbers(found), indent=1).encode() + b"\n")


def percent(share: dict) -> str:
    """A share, as :func:`numbers` writes it, for people: 62.5% (54.4 to 70.0)."""
    low, high = share["interval"]
    return f"{share['percent']:.1f}% ({low:.1f} to {high:.1f})"


def p_and_effect(comparison: dict | None) -> str:
    """p and the effect of a Mann-Whitney test, as :func:`numbers` writes it; None: there was nothing to compare."""
    if comparison is None:
        return "not defined"
    p = "< 1e-300" if comparison["p"] == 0 else f"= {comparison['p']:.1e}"
    return f"p {p}, effect {comparison['effect']:.3f}"
