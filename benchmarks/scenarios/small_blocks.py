"""Many small blocks: a blocked Cholesky-like sweep over 64 x 64 tiles (32 KiB each)."""

import numpy as np

TILE, TILES, SWEEPS = 64, 24, 48


def main():
    rng = np.random.default_rng(0)
    tiles = {
        (row, column): rng.standard_normal((TILE, TILE)) / TILE
        for row in range(TILES)
        for column in range(TILES)
    }
    for _ in range(SWEEPS):
        for pivot in range(TILES):
            scale = np.abs(tiles[pivot, pivot]) + 1.0
            for row in range(TILES):
                factor = tiles[row, pivot] / scale
                for column in range(pivot % 2, TILES, 2):
                    update = factor * tiles[pivot, column] + 0.5 * factor
                    tiles[row, column] = tiles[row, column] * 0.99 - update
    print(f"sum {sum(float(tile.sum()) for tile in tiles.values()):.9f}")


main()
