"""Black-Scholes prices and Greeks of 400 000 options at a time."""

import numpy as np
from scipy.special import ndtr

OPTIONS, ROUNDS = 400_000, 22


def prices(spot, strike, years, rate, volatility):
    deviation = volatility * np.sqrt(years)
    d1 = (np.log(spot / strike) + (rate + 0.5 * volatility**2) * years) / deviation
    d2 = d1 - deviation
    discount = strike * np.exp(-rate * years)
    call = spot * ndtr(d1) - discount * ndtr(d2)
    put = discount * ndtr(-d2) - spot * ndtr(-d1)
    density = np.exp(-0.5 * d1**2) / np.sqrt(2 * np.pi)
    gamma = density / (spot * deviation)
    vega = spot * density * np.sqrt(years)
    return call, put, gamma, vega


def main():
    rng = np.random.default_rng(0)
    spot = rng.uniform(50, 150, OPTIONS)
    strike = rng.uniform(50, 150, OPTIONS)
    years = rng.uniform(0.1, 2.0, OPTIONS)
    total = np.zeros(4)
    for round_index in range(ROUNDS):
        volatility = 0.1 + 0.02 * round_index + 0.1 * spot / 150
        total += [part.mean() for part in prices(spot, strike, years, 0.02, volatility)]
    print("call {:.6f} put {:.6f} gamma {:.6f} vega {:.6f}".format(*total))


main()
