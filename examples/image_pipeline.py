"""Clean up photographs: denoise, equalise, find edges, straighten, and measure their colours.

The photographs come inside the wheels of scikit-learn and scikit-image. The program knows nothing
of Moirai; run it with `python` or with `python -m moirai run`: it prints the same.

    python examples/image_pipeline.py --repeat 3
"""

import argparse
import importlib.util
import zlib
from pathlib import Path

import numpy as np
from skimage import color, exposure, feature, filters, io, restoration, transform, util

PHOTOGRAPHS = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "astronaut": ("skimage", "data/astronaut.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
}


def load(name):
    """Read a photograph from the package that ships it: floats in [0, 1], three channels."""
    package, path = PHOTOGRAPHS[name]
    folder = Path(importlib.util.find_spec(package).origin).parent
    return util.img_as_float(io.imread(folder / path)[..., :3])


def process(photograph):
    """Return the edges and the Lab colours of the cleaned photograph."""
    denoised = restoration.denoise_tv_chambolle(
        photograph, weight=0.05, max_num_iter=20, channel_axis=-1
    )
    equalised = exposure.equalize_adapthist(denoised, clip_limit=0.02)
    # channel_axis=2, not -1: with -1 scikit-image 0.26 leaves part of the result uninitialised.
    sharpened = filters.unsharp_mask(equalised, radius=2.0, amount=0.7, channel_axis=2)
    straightened = transform.rotate(sharpened, 7.0, resize=True, order=3, mode="reflect")
    lab = color.rgb2lab(straightened)
    grey = color.rgb2gray(straightened)
    edges = feature.canny(grey, sigma=1.5) | (filters.sobel(grey) > 0.2)
    return edges, lab


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--repeat", type=int, default=1, help="how often to process the photographs"
    )
    parser.add_argument("--photographs", nargs="+", choices=PHOTOGRAPHS, default=list(PHOTOGRAPHS))
    arguments = parser.parse_args()
    if arguments.repeat < 1:
        parser.error(f"--repeat: must be at least 1, got {arguments.repeat}")
    for _ in range(arguments.repeat):
        lines = []
        for name in arguments.photographs:
            edges, lab = process(load(name))
            colours = " ".join(f"{value:+.3f}" for value in lab.mean(axis=(0, 1)))
            checksum = zlib.crc32(np.round(lab, 6).tobytes())
            rows, columns = edges.shape
            lines.append(
                f"{name:10s} {columns:4d} x {rows:<4d} edges {edges.mean():7.3%} "
                f"mean Lab {colours}  checksum {checksum:08x}"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
