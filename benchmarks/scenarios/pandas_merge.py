"""A merge of two tables, derived columns and several groupbys (pandas)."""

import numpy as np
import pandas as pd

ORDERS, CUSTOMERS, ROUNDS = 500_000, 40_000, 12


def main():
    rng = np.random.default_rng(0)
    orders = pd.DataFrame(
        {
            "customer": rng.integers(0, CUSTOMERS, ORDERS),
            "product": rng.integers(0, 500, ORDERS),
            "amount": rng.exponential(30.0, ORDERS),
            "units": rng.integers(1, 9, ORDERS),
        }
    )
    customers = pd.DataFrame(
        {
            "customer": rng.permutation(CUSTOMERS),
            "region": rng.integers(0, 12, CUSTOMERS),
            "discount": rng.uniform(0.0, 0.3, CUSTOMERS),
        }
    )
    for _ in range(ROUNDS):
        merged = orders.merge(customers, on="customer", how="left")
        merged["paid"] = merged["amount"] * merged["units"] * (1.0 - merged["discount"])
        merged["band"] = (merged["paid"] // 25).clip(upper=40).astype("int64")
        by_region = merged.groupby(["region", "product"])["paid"].agg(["sum", "mean", "std"])
        by_customer = merged.sort_values("paid").groupby("customer")["paid"].agg(["median", "last"])
        pivot = merged.pivot_table(index="band", columns="region", values="units", aggfunc="sum")
    print(
        f"{by_region['sum'].sum():.3f} {by_region['std'].mean():.6f} "
        f"{by_customer['median'].sum():.3f} {pivot.to_numpy().sum():.0f}"
    )


main()
