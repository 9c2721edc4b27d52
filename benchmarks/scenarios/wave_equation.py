"""The wave equation on a 900 x 900 membrane, leapfrog in plain NumPy expressions."""

import numpy as np

SIDE, STEPS = 900, 160


def laplacian(field):
    return (
        np.roll(field, 1, 0) + np.roll(field, -1, 0) + np.roll(field, 1, 1) + np.roll(field, -1, 1)
        - 4.0 * field
    )  # fmt: skip


def main():
    y, x = np.mgrid[0 : 1 : SIDE * 1j, 0 : 1 : SIDE * 1j]
    now = np.exp(-200.0 * ((x - 0.4) ** 2 + (y - 0.5) ** 2))
    before = now.copy()
    damping = 0.001
    for _ in range(STEPS):
        now, before = now + (1.0 - damping) * (now - before) + 0.2 * laplacian(now), now
    print(f"energy {np.square(now).sum():.6f}, peak {now.max():.6f}")


main()
