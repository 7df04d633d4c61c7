"""What the measurements of `mup_transfer` say of the claims of arXiv 2312.12226: a pure function of its tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from hf_so2.papers.mup.curves import Curves, distance, growth
from hf_so2.papers.verdict import Claim, Comparison, compare, differences

Tables: TypeAlias = Mapping[str, Any]

PAPER = "2312.12226"
STEP = 1.0  # log2: one step of the usual grid of rates, ×2
FLAT = 0.15  # an exponent of the feature change within it counts as none, as in the coordinate check
LEVEL = 0.02  # log10: 5 % of a loss that may still be lost to noise from one width to the next
KERNEL = 0.95  # cosine
NAMES = ("K-FAC", "Shampoo")


def claims_of(tables: Tables) -> tuple[Claim, ...]:
    """All claims, in the order of the table."""
    return (
        *(claim for name in NAMES for claim in feature_claims(tables, name)),
        *(
            claim
            for network, found in tables["networks"].items()
            for name in NAMES
            for claim in width_claims(network, found, name)
        ),
        *last_layer_claims(tables),
        *zero_claims(tables),
    )


def feature_claims(tables: Tables, name: str) -> tuple[Claim, ...]:
    """Of the change of every layer's outputs in an MLP."""
    run, key = features_run(tables), key_of(name)

    def exponents(setup: str) -> Mapping[int, Sequence[float]]:
        found: Mapping[int, Sequence[float]] = tables["feature_change"][setup]["exponents"]
        return found

    return (
        Claim(f"{key}-features", PAPER, "abstract", f"under μP {name} changes every layer's outputs alike at every"
              " width", run, flat(exponents(f"{name}, μP"))),
        Claim(f"{key}-features-sp", PAPER, "", f"under the standard parametrization {name} does not: some layer's"
              " change goes with a power of the width", run, (
                  compare("largest |exponent|", [max(map(abs, e)) for e in exponents(f"{name}, SP").values()],
                          above=FLAT),
              )),
        Claim(f"{key}-features-spectral", PAPER, "", f"with spectral control, this package's default, {name} changes"
              " every layer's outputs alike at every width", run, flat(exponents(f"{name}, spectral control, μP"))),
    )  # fmt: skip


def width_claims(network: str, found: Tables, name: str) -> tuple[Claim, ...]:
    """Of the best rate, the best damping and the loss over the width."""
    widths, rates, dampings = found["widths"], found["rates"], found["dampings"]
    mup, sp, ours = f"{name}, μP", f"{name}, SP", f"{name}, spectral control, μP"
    key, run, on = f"{key_of(name)}-{{}}-{network.lower()}", found["run"], f", {network}"
    claims = [
        Claim(key.format("rate"), PAPER, "abstract", f"{name}'s best rate transfers over the width under μP: within one"
              f" step of a grid of factors of 2{on}", run, within("log2 of its growth", growth(rates[mup]), STEP)),
        Claim(key.format("rate-sp"), PAPER, "", f"{name}'s best rate moves by more than a step under the standard"
              f" parametrization{on}", run, (
                  compare("|log2 of its growth|", distance(rates[sp]), above=STEP),)),
        Claim(key.format("rate-spectral"), PAPER, "", f"with spectral control, this package's default, {name}'s best"
              f" rate transfers too{on}", run, within("log2 of its growth", growth(rates[ours]), STEP)),
        Claim(key.format("wider"), PAPER, "", f"wider is better under μP: at the rate that is best at width"
              f" {widths[0]}, {name}'s loss falls from each width to the next{on}", run, tuple(
                  compare(f"log10 of the loss at {b} over that at {a}",
                          differences(as_tuned(rates[mup], b), as_tuned(rates[mup], a)), below=LEVEL)
                  for a, b in itertools.pairwise(widths))),
        Claim(key.format("wider-sp"), PAPER, "", f"not so under the standard parametrization: with what is best at"
              f" width {widths[0]}, the widest {name} is worse than it is under μP{on}", run, (
                  compare(f"log10 of the loss at {widths[-1]}, SP over μP",
                          differences(as_tuned(rates[sp], widths[-1]), as_tuned(rates[mup], widths[-1])), above=0.0),)),
    ]  # fmt: skip
    if dampings:
        claims += [
            Claim(key.format("damping"), PAPER, "section 4.2", f"the best rescaled damping of {name} transfers: within"
                  f" a factor of 4{on}", run, within("log2 of its growth", growth(dampings[mup]), 2 * STEP)),
            Claim(key.format("damping-sp"), PAPER, "section 4.2", "a constant damping does not, under the standard"
                  f" parametrization: {name}'s best one moves by more than a factor of 4{on}", run, (
                      compare("|log2 of its growth|", distance(dampings[sp]), above=2 * STEP),)),
        ]  # fmt: skip
    return tuple(claims)


def last_layer_claims(tables: Tables) -> tuple[Claim, ...]:
    """The change of hidden layers in the first step goes like `M^(b - 1)`."""
    parts: list[Comparison] = []
    for exponent, table in tables["last_layer"].items():
        off = [sum(e[:-1]) / len(e[:-1]) - (exponent - 1) for e in table["exponents"].values()]
        parts += within(f"exponent at b = {exponent:g} less {exponent - 1:g}", off, FLAT)
    text = (
        "K-FAC's first step changes hidden layers by M^(b - 1) where the last layer starts with a standard deviation"
        " of M^-b, so that b = 1 is right"
    )
    return (Claim("kfac-last-layer", PAPER, "", text, features_run(tables), tuple(parts)),)


def zero_claims(tables: Tables) -> tuple[Claim, ...]:
    """What a last layer that starts at zero does in the first step."""
    records = tables["zero"]
    widths = sorted(records[0]["zero"])
    run = f"MLP 64-M-M-M-10, M = {', '.join(map(str, widths))}, one step of K-FAC on all images; {len(records)} seeds"

    def at(start: str, width: int, what: str) -> list[float]:
        return [record[start][width][what] for record in records]

    widest, narrowest = widths[-1], widths[0]
    nngp = "cosine_nngp_kernel"
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
            compare(f"cosine with the NNGP solution, M = {widest}", at("zero", widest, nngp), above=KERNEL),
            compare(f"growth of it from M = {narrowest}",
                    differences(at("zero", widest, nngp), at("zero", narrowest, nngp)), above=0.0),
        )),
    )  # fmt: skip


def key_of(name: str) -> str:
    """`K-FAC` -> `kfac`."""
    return name.lower().replace("-", "")


def features_run(tables: Tables) -> str:
    """What changes of outputs were measured on."""
    seeds = len(next(iter(tables["feature_change"].values()))["exponents"])
    return f"MLP 64-M-M-M-10 on the digits, M = {', '.join(map(str, tables['feature_widths']))}; {seeds} seeds"


def flat(by_seed: Mapping[int, Sequence[float]]) -> tuple[Comparison, ...]:
    """Every layer's exponent within ±`FLAT`."""
    layers = zip(*by_seed.values(), strict=True)
    return tuple(part for n, values in enumerate(layers, 1) for part in within(f"exponent of layer {n}", values, FLAT))


def within(quantity: str, samples: Sequence[float], reach: float) -> tuple[Comparison, ...]:
    """From -reach to reach: two bounds that both have to hold, the one in question first."""
    low, high = compare(quantity, samples, above=-reach), compare(quantity, samples, below=reach)
    return (high, low) if high.mean > 0 else (low, high)


def as_tuned(curves: Curves, width: int) -> list[float]:
    """Scores at the values tuned at the base width, per seed."""
    return [curve[0] for curve in curves[width].values()]
