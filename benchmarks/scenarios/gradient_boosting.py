"""HistGradientBoosting on 30 000 rows (scikit-learn)."""

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor


def main():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((30_000, 20))
    target = features[:, 0] * features[:, 1] + np.sin(3 * features[:, 2]) + 0.1 * features[:, 3]
    model = HistGradientBoostingRegressor(
        max_iter=50, max_leaf_nodes=63, early_stopping=False, random_state=0
    )
    model.fit(features, target)
    print(f"score {model.score(features, target):.9f}")


main()
