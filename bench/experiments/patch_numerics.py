"""How exact are the distances of patch_topk at every noise level, on real photographs?

For each timestep of the linear schedule of 1000 (beta 1e-4 to 0.02), queries are noised images of the data, and their
patches are compared with the patches of other images: the error of the exponent d / (2 sigma^2) among patches within 25
of the smallest, and the total variation between the softmaxes, against float64. Beside our kernel the published
expansion |a|^2 - 2ab + |b|^2 in float32. Every patch of the bank is an image of its own, of which only the centre
position is of the query's kind, so that the kernel's least distance is that of the two patches.

    python -m bench.experiments.patch_numerics DATA.npz OUT.json

DATA.npz holds an array of images [N, H, W, C] or [N, C, H, W] of uint8. Two minutes on one core.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from pyattr import backends
from pyattr.files import whole_file

TIMESTEPS = (1, 10, 50, 100, 300, 500)
PATCH_SIZE, IMAGES, QUERIES, POSITIONS = 7, 160, 4, 3  # patches of the bank: 676 of each image


def images_of(path: Path) -> torch.Tensor:
    """[N, C, H, W] uint8, the first such array of the file."""
    with np.load(path) as data:
        array = next(data[name] for name in data.files if data[name].ndim == 4 and data[name].dtype == np.uint8)
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy() if array.shape[-1] in (1, 3) else array)


def ours(query: torch.Tensor, patches: torch.Tensor, scale: float, inverse: float) -> torch.Tensor:
    """Distances of one patch [C, p, p] to each of [M, C, p, p] uint8 by the CPU kernel.  # [M]"""
    minima, sums, tops = torch.empty(3, 1, len(patches))
    middle = (PATCH_SIZE - 1) // 2
    backends.extension().patch_topk_cpu(
        query.data_ptr(), patches.data_ptr(), 3, patches.stride(), patches.shape, query.shape[1:], PATCH_SIZE, 0, False,
        scale, inverse, (middle, middle + 1, middle, middle + 1), len(patches), 1, minima.data_ptr(), sums.data_ptr(),
        tops.data_ptr(), 0, torch.get_num_threads(),
    )  # fmt: skip
    return minima[0]


def expanded(query: torch.Tensor, patches: torch.Tensor, scale: float) -> torch.Tensor:
    """The same as the published code has it, in float32."""
    x, y = query.flatten(), scale * ((2 * patches.float() - 255) / 255).flatten(1)
    return (x @ x - 2 * (y @ x) + y.square().sum(1)).clamp(min=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    images = images_of(options.data)
    chosen = images[torch.randperm(len(images), generator=generator)[: IMAGES + QUERIES]]
    patches = functional.unfold(chosen[:IMAGES].float(), PATCH_SIZE).mT.flatten(0, 1).to(torch.uint8)
    patches = patches.view(-1, images.shape[1], PATCH_SIZE, PATCH_SIZE).contiguous()
    exact_patches = ((2 * patches.double() - 255) / 255).flatten(1)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    table = []
    for t in TIMESTEPS:
        scale, variance = float(alpha_bar[t] ** 0.5), float(1 - alpha_bar[t])
        worst = {name: {"exponent": 0.0, "total_variation": 0.0} for name in ("ours", "expansion in float32")}
        for clean in chosen[IMAGES:]:
            noise = torch.randn(clean.shape, generator=generator)
            noisy = scale * (2 * clean.float() - 255) / 255 + variance**0.5 * noise
            windows = functional.unfold(noisy[None], PATCH_SIZE)[0].T.view(-1, *patches.shape[1:])
            for x in windows[torch.randperm(len(windows), generator=generator)[:POSITIONS]]:
                x = x.contiguous()
                exact = (x.double().flatten() - scale * exact_patches).square().sum(1) / (2 * variance)
                near = exact <= exact.min() + 25
                found = {
                    "ours": ours(x, patches, scale, 1 / (2 * variance)),
                    "expansion in float32": expanded(x, patches, scale),
                }
                for name, distances in found.items():
                    e = distances.double() / (2 * variance)
                    tv = (torch.softmax(-e, 0) - torch.softmax(-exact, 0)).abs().sum().item() / 2
                    entry = worst[name]
                    entry["exponent"] = max(entry["exponent"], (e - exact)[near].abs().max().item())
                    entry["total_variation"] = max(entry["total_variation"], tv)
        table.append({"t": t, "sigma^2": variance, **worst})
        print(json.dumps(table[-1]), flush=True)
    record = {"patch_size": PATCH_SIZE, "patches": len(patches), "queries": QUERIES * POSITIONS, "largest": table}
    with whole_file(options.out) as stream:
        stream.write((json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
