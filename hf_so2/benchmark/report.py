"""The figures of a benchmark as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_so2.benchmark.phases import PHASES
from hf_so2.benchmark.ratios import Spread, paired_ratios
from hf_so2.benchmark.rounds import Measurement


def ratios(measurements: Sequence[Measurement], baseline: str) -> dict[str, Spread]:
    """By name: a whole step's time relative to that of `baseline` in the same round."""
    (reference,) = (m.mean_seconds for m in measurements if m.name == baseline)
    return {m.name: paired_ratios(m.mean_seconds, reference) for m in measurements}


def to_dict(measurements: Sequence[Measurement], baseline: str) -> dict[str, Any]:
    """Everything measured, by optimizer; times in seconds."""
    spreads = ratios(measurements, baseline)
    return {
        m.name: {
            "ratio": vars(spreads[m.name]),
            "step_seconds": {"p50": m.percentile(50), "p99": m.percentile(99), "rounds": m.rounds},
            "phase_seconds": {phase: m.phase(phase) for phase in PHASES},
            "phase_flops": {phase: m.flops.get(phase, 0.0) for phase in PHASES},
            "peak_bytes": m.peak_bytes,
            "state_bytes_per_parameter": m.state_bytes_per_parameter,
        }
        for m in measurements
    }


def table(measurements: Sequence[Measurement], baseline: str) -> str:
    """One row per optimizer, the quickest first, as Markdown; times in milliseconds."""
    spreads = ratios(measurements, baseline)
    header = [
        "optimizer",
        f"step / {baseline}",
        "p50",
        "p99",
        "p99/p50",
        "peak MiB",
        "state B/param",
        *PHASES,
    ]
    rows = [
        [
            m.name,
            str(spreads[m.name]),
            _ms(m.percentile(50)),
            _ms(m.percentile(99)),
            f"{m.percentile(99) / m.percentile(50):.2f}",
            f"{m.peak_bytes / 2**20:.0f}",
            f"{m.state_bytes_per_parameter:.1f}",
            *(_ms(m.phase(phase)) for phase in PHASES),
        ]
        for m in sorted(measurements, key=lambda m: spreads[m.name].median)
    ]
    return markdown([header, ["---"] * len(header), *rows])


def against_peers(measurements: Sequence[Measurement], methods: Mapping[str, str]) -> dict[str, dict[str, Spread]]:
    """By peer and by ours: our whole step's time relative to the peer's in the same round.

    Args:
        measurements: of both.
        methods: by name of a peer the method of ours that it is to be compared with; variants of it count as well.
    """
    return {
        peer.name: {
            own.name: paired_ratios(own.mean_seconds, peer.mean_seconds)
            for own in measurements
            if own.name.partition(":")[0] == methods[peer.name]
        }
        for peer in measurements
        if peer.name in methods
    }


def peer_table(against: Mapping[str, Mapping[str, Spread]]) -> str:
    """One row per pair, as Markdown; empty without any."""
    rows = [[own, peer, str(spread)] for peer, found in against.items() for own, spread in found.items()]
    header = ["ours", "peer", "step / peer's step"]
    return markdown([header, ["---"] * len(header), *rows]) if rows else ""


def work_table(measurements: Sequence[Measurement], rate: float) -> str:
    """GFLOP of each phase, and the share of the machine's rate of products that it runs at, as Markdown.

    Args:
        measurements: of all optimizers; a phase without matrix algebra is left out.
        rate: operations per second.
    """
    phases = [phase for phase in PHASES if any(m.flops.get(phase) for m in measurements)]
    header = ["optimizer", *phases]
    rows = [[m.name, *(_work(m.flops.get(phase, 0.0), m.phase(phase), rate) for phase in phases)] for m in measurements]
    return markdown([header, ["---"] * len(header), *rows])


def _work(flops: float, seconds: float, rate: float) -> str:
    return f"{flops / 1e9:.3g} · {flops / seconds / rate:.0%}" if flops and seconds else ""


def growth_table(exponents: Mapping[str, Mapping[str, float]], counted: Mapping[str, Mapping[str, float]]) -> str:
    """Exponents of the hidden size, by optimizer and phase, and those of the operations in brackets, as Markdown."""
    header = ["optimizer", "whole step", *PHASES]
    rows = [
        [name, *(_exponents(row[column], counted[name][column]) for column in header[1:])]
        for name, row in exponents.items()
    ]
    return markdown([header, ["---"] * len(header), *rows])


def _exponents(measured: float, counted: float) -> str:
    return "" if math.isnan(measured) else f"{measured:.2f}" + ("" if math.isnan(counted) else f" ({counted:.2f})")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table whose columns line up as plain text, too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.4g}"
