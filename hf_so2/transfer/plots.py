"""Figures that the scripts leave beside their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # not pyplot: no window, no global state, whatever the user's backend is


def plot_loss_curve(log_history: Iterable[Mapping[str, Any]], path: str | Path, title: str) -> None:
    """Draws training and evaluation loss against the optimizer step into a PNG.

    Args:
        log_history: Trainer's ``state.log_history``: entries with ``step`` and ``loss`` or ``eval_loss``
            (nats per token).
        path: the file to write.
        title: what was trained.
    """
    entries = list(log_history)
    training = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    evaluation = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), ".-", color="tab:blue", linewidth=1.5, label="training loss")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", color="tab:orange", label="evaluation loss")
        step, loss = evaluation[-1]
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color="tab:orange",
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if training or evaluation:
        axes.legend()
    figure.savefig(path, dpi=150)
