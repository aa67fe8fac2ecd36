"""The picture of docs/analytic.md: what each analytic denoiser draws from the same noises.

``python -m bench.experiments.analytic_grid OUT.png``: eight digits from each, in 20 DDIM steps, from 1,000 MNIST digits.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pyattr.datasets import load
from pyattr.diffusion import Schedule, sample
from pyattr.diffusion.analytic import ScoreMachine
from pyattr.files import whole_file

MACHINES = ("is", "ls", "bbels", "els")
DIGITS, COLUMNS, STEPS = 1000, 8, 20
ENLARGED, GUTTER = 3, 4  # times, pixels


def grid(rows: list[np.ndarray]) -> Image.Image:
    """Rows of [Q, 1, H, W] uint8 images on white."""
    columns, _, height, width = rows[0].shape
    tall, wide = height * ENLARGED + GUTTER, width * ENLARGED + GUTTER
    page = np.full((len(rows) * tall - GUTTER, columns * wide - GUTTER), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row[:, 0]):
            enlarged = image.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
            page[r * tall : r * tall + height * ENLARGED, c * wide : c * wide + width * ENLARGED] = enlarged
    return Image.fromarray(page)


def main(path: Path) -> None:
    """Draw and write the picture."""
    digits, schedule, rows = load("mnist_5k").spread(DIGITS).images, Schedule(), []
    for name in MACHINES:
        machine = ScoreMachine(digits, schedule, name)
        rows.append(sample(machine, schedule, shape=(1, 28, 28), num_images=COLUMNS, steps=STEPS).uint8().numpy())
        print(f"{name}: {COLUMNS} digits", flush=True)
    with whole_file(path) as stream:
        grid(rows).save(stream, "PNG", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
