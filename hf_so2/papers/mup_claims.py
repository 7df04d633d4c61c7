"""What the measurements of `mup_transfer` say of the claims of arXiv 2312.12226: a pure function of its tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from hf_so2.papers.verdict import Claim, Comparison, compare

Tables: TypeAlias = Mapping[str, Any]

PAPER = "2312.12226"
STEP = 1.0  # log2: one step of the usual grid of rates, ×2
FLAT = 0.15  # an exponent of the feature change within it counts as none, as in the coordinate check
LEVEL = 0.02  # log10: 5 % of a loss that may still be lost to noise from one width to the next
KERNEL = 0.95  # cosine


def claims_of(tables: Tables) -> tuple[Claim, ...]:
    """All claims, in the order of the table."""
    widths, seeds = tables["widths"], len(tables["feature_change"]["K-FAC, μP"]["exponents"])
    net = f"MLP 64-M-M-M-10, M = {', '.join(map(str, widths))}, trace damping, no norm control; {seeds} seeds"
    wide = f"the same network, M = {', '.join(map(str, tables['feature_widths']))}; {seeds} seeds"
    claims: list[Claim] = []
    for name in ("K-FAC", "Shampoo"):
        key, mup, sp = name.lower().replace("-", ""), f"{name}, μP", f"{name}, SP"
        ours, best = f"{name}, spectral control, μP", tables["best_rate"]
        claims += [
            Claim(f"{key}-features", PAPER, "abstract", f"under μP {name} changes every layer's outputs alike at every"
                  " width", wide, flat(tables["feature_change"][mup]["exponents"])),
            Claim(f"{key}-features-sp", PAPER, "", f"under the standard parametrization {name} does not: some layer's"
                  " change goes with a power of the width", wide, (
                      compare("largest |exponent|", [max(map(abs, e)) for e in exponents(tables, sp)], above=FLAT),
                  )),
            Claim(f"{key}-rate", PAPER, "abstract", f"{name}'s best rate transfers over the width under μP: within one"
                  " step of a grid of factors of 2", net, within("log2 of its growth", shifts(best[mup]), STEP)),
            Claim(f"{key}-rate-sp", PAPER, "", f"{name}'s best rate moves by more than a step under the standard"
                  " parametrization", net, (compare("|log2 of its growth|", map(abs, shifts(best[sp])), above=STEP),)),
            Claim(f"{key}-rate-spectral", PAPER, "", f"with spectral control, this package's default, {name}'s best"
                  " rate transfers too", net.replace("no norm control", "spectral control"),
                  within("log2 of its growth", shifts(best[ours]), STEP)),
            Claim(f"{key}-wider", PAPER, "", f"wider is better under μP: at the rate that is best at width"
                  f" {widths[0]}, {name}'s loss falls from each width to the next", net, tuple(
                      compare(f"log10 of the loss at {b} over that at {a}", gains(tables, mup, a, b), below=LEVEL)
                      for a, b in itertools.pairwise(widths))),
            Claim(f"{key}-wider-sp", PAPER, "", f"not so under the standard parametrization: the widest {name} is worse"
                  " than it is under μP", net, (
                      compare(f"log10 of the loss at {widths[-1]}, SP over μP", against(tables, sp, mup), above=0.0),)),
            Claim(f"{key}-damping", PAPER, "section 4.2", f"the best rescaled damping of {name} transfers: within a"
                  " factor of 4", net, within("log2 of its growth", shifts(tables["best_damping"][mup]), 2 * STEP)),
        ]  # fmt: skip
    claims += [
        Claim("kfac-damping-other", PAPER, "", "a constant damping, under the standard parametrization, does not"
              " transfer: K-FAC's best one moves by more than a factor of 4", net, (
                  compare("|log2 of its growth|",
                          map(abs, shifts(tables["best_damping"]["K-FAC, constant damping, SP"])), above=2 * STEP),)),
        *last_layer_claims(tables, wide),
        *zero_claims(tables),
    ]  # fmt: skip
    return tuple(claims)


def last_layer_claims(tables: Tables, run: str) -> tuple[Claim, ...]:
    """The change of hidden layers in the first step goes like `M^(b - 1)`."""
    parts: list[Comparison] = []
    for exponent, table in tables["last_layer"].items():
        off = [sum(e[:-1]) / len(e[:-1]) - (exponent - 1) for e in table["exponents"].values()]
        parts += within(f"exponent at b = {exponent:g} less {exponent - 1:g}", off, FLAT)
    text = (
        "K-FAC's first step changes hidden layers by M^(b - 1) where the last layer starts with a standard deviation"
        " of M^-b, so that b = 1 is right"
    )
    return (Claim("kfac-last-layer", PAPER, "", text, run, tuple(parts)),)


def zero_claims(tables: Tables) -> tuple[Claim, ...]:
    """What a last layer that starts at zero does in the first step."""
    records = tables["zero"]
    widths = sorted(records[0]["zero"])
    run = f"MLP 64-M-M-M-10, M = {', '.join(map(str, widths))}, one step of K-FAC on all images; {len(records)} seeds"

    def at(start: str, width: int, what: str) -> list[float]:
        return [record[start][width][what] for record in records]

    widest, narrowest = widths[-1], widths[0]
    growth = [b - a for a, b in zip(at("zero", narrowest, "cosine_nngp_kernel"),
                                    at("zero", widest, "cosine_nngp_kernel"), strict=True)]  # fmt: skip
    return (
        Claim("kfac-zero-features", PAPER, "", "with a last layer of zero, K-FAC's first step learns no features; with"
              " a random one it does", run, (
                  compare("change of hidden outputs from zero", at("zero", widest, "hidden_change"), below=1e-6),
                  compare("from random", at("random", widest, "hidden_change"), above=0.01),
              )),
        Claim("kfac-zero-kernel", PAPER, "", "that step lands in the direction of the kernel solution, on test images",
              run, (compare(f"cosine with ridge regression on the features, M = {widest}",
                            at("zero", widest, "cosine_own_kernel"), above=KERNEL),)),
        Claim("kfac-zero-nngp", PAPER, "", "the wider the network, the nearer to that of the NNGP kernel", run, (
            compare(f"cosine with the NNGP solution, M = {widest}", at("zero", widest, "cosine_nngp_kernel"),
                    above=KERNEL),
            compare(f"growth of it from M = {narrowest}", growth, above=0.0),
        )),
    )  # fmt: skip


def exponents(tables: Tables, name: str) -> list[Sequence[float]]:
    """Of every layer's change, per seed."""
    return list(tables["feature_change"][name]["exponents"].values())


def flat(by_seed: Mapping[int, Sequence[float]]) -> tuple[Comparison, ...]:
    """Every layer's exponent within ±`FLAT`."""
    layers = zip(*by_seed.values(), strict=True)
    return tuple(part for n, values in enumerate(layers, 1) for part in within(f"exponent of layer {n}", values, FLAT))


def within(quantity: str, samples: Sequence[float], reach: float) -> tuple[Comparison, ...]:
    """From -reach to reach: two bounds that both have to hold, the one in question first."""
    low, high = compare(quantity, samples, above=-reach), compare(quantity, samples, below=reach)
    return (high, low) if high.mean > 0 else (low, high)


def shifts(best: Mapping[int, Sequence[float]]) -> list[float]:
    """log2 of the best value at the widest network over that at the narrowest, per seed."""
    widths = sorted(best)
    return [math.log2(b / a) for a, b in zip(best[widths[0]], best[widths[-1]], strict=True)]


def scores_at(tables: Tables, name: str, width: int) -> list[float]:
    """Scores at the rate that is best at the base width, per seed."""
    rate = tables["tuned_at_base"][name]
    return [curve[rate] for curve in tables["scores_by_rate"][name][width].values()]


def gains(tables: Tables, name: str, narrow: int, wide: int) -> list[float]:
    """Score at one width less that at another."""
    pairs = zip(scores_at(tables, name, wide), scores_at(tables, name, narrow), strict=True)
    return [a - b for a, b in pairs]


def against(tables: Tables, first: str, second: str) -> list[float]:
    """Scores of two setups at the widest network, each at its rate from the base width."""
    widest = max(tables["widths"])
    pairs = zip(scores_at(tables, first, widest), scores_at(tables, second, widest), strict=True)
    return [a - b for a, b in pairs]
