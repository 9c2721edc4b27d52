"""Segment photographs by colour with a Gaussian mixture, and report the area of each segment.

The photographs come inside the wheels of scikit-learn and scikit-image. The program knows nothing
of Moirai; run it with `python` or with `python -m moirai run`: it prints the same.

    python examples/photo_segmentation.py --repeat 2 --segments 6
"""

import argparse
import importlib.util
import warnings
import zlib
from pathlib import Path

import numpy as np
from skimage import color, io
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

PHOTOGRAPHS = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "astronaut": ("skimage", "data/astronaut.png"),
}


def load_pixels(name):
    """Lab colour and position of each pixel, scaled to comparable ranges; shape (pixels, 5)."""
    package, path = PHOTOGRAPHS[name]
    folder = Path(importlib.util.find_spec(package).origin).parent
    lab = color.rgb2lab(io.imread(folder / path)[..., :3])
    rows, columns = np.indices(lab.shape[:2])
    height = lab.shape[0]
    return np.column_stack(
        [lab.reshape(-1, 3) / 100, rows.ravel() / (2 * height), columns.ravel() / (2 * height)]
    )


def segment(pixels, segment_count, iterations):
    """Fit the mixture; return the segment of each pixel and the mean log-likelihood."""
    mixture = GaussianMixture(
        segment_count, init_params="k-means++", max_iter=iterations, random_state=0
    )
    with warnings.catch_warnings():  # a bounded number of iterations is what was asked for
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(pixels)
    return mixture.predict(pixels), mixture.score(pixels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--repeat", type=int, default=1, help="how often to segment the photographs"
    )
    parser.add_argument("--segments", type=int, default=6, help="number of segments")
    parser.add_argument("--iterations", type=int, default=5, help="at most this many steps of EM")
    parser.add_argument(
        "--photographs", nargs="+", choices=PHOTOGRAPHS, default=["china", "flower"]
    )
    arguments = parser.parse_args()
    if arguments.repeat < 1:
        parser.error(f"--repeat: must be at least 1, got {arguments.repeat}")
    for _ in range(arguments.repeat):
        lines = []
        for name in arguments.photographs:
            labels, score = segment(load_pixels(name), arguments.segments, arguments.iterations)
            shares = np.sort(np.bincount(labels, minlength=arguments.segments) / labels.size)[::-1]
            checksum = zlib.crc32(labels.astype(np.uint8).tobytes())
            areas = " ".join(f"{share:5.1%}" for share in shares)
            lines.append(
                f"{name:8s} areas {areas}  likelihood {score:.6f}  checksum {checksum:08x}"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
