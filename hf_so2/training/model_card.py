"""What a model card says of the optimizer: a section for the README.md that a Trainer writes."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from hf_so2.mup import MupReport
from hf_so2.optim import SecondOrderOptimizer
from hf_so2.training.argument_fields import BASE_FIELDS
from hf_so2.training.arguments import SecondOrderArgumentsMixin

TAG = "hf_so2"
PACKAGES = ("hf_so2", "torch", "transformers", "accelerate", "peft", "trl")
# What else decides how a model was trained, from any kind of arguments.
_TRAINING = (
    "per_device_train_batch_size gradient_accumulation_steps max_steps num_train_epochs lr_scheduler_type warmup_steps"
    " max_grad_norm bf16 fp16 seed"
).split()
_BEGIN, _END = "<!-- hf_so2 -->", "<!-- end of hf_so2 -->"


def settings_in_use(args: SecondOrderArgumentsMixin) -> dict[str, Any]:
    """Every flag that decides about the run's optimizer and schedule, defaults written out.

    They make the same optimizer again, whatever the defaults are by then: `SecondOrderTrainingArguments(**them)`.
    """
    base = {name: getattr(args, name) for name in BASE_FIELDS}
    training = {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in _TRAINING}
    if args.max_steps > 0:
        del training["num_train_epochs"]  # has no effect beside it
    return args.optimizer_flags() | {name: value for name, value in (base | training).items() if value is not None}


def write_section(
    path: Path,
    args: SecondOrderArgumentsMixin,
    mup: MupReport | None,
    optimizer: SecondOrderOptimizer | None,
    notes: Mapping[str, str],
) -> None:
    """Add the section to a model card, or put it in the place of an earlier one, and tag the model.

    Args:
        path: the card, with or without metadata.
        args: of the run.
        mup: of its model, if μP was applied.
        optimizer: of the run, if it has been built.
        notes: more rows of the table.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    before, _, rest = card.text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    section = "\n".join([_BEGIN, *_lines(args, mup, optimizer, notes), _END])
    card.text = f"{before.rstrip()}\n\n{section}\n{after}"
    tags = card.data.tags or []
    card.data.tags = [*([tags] if isinstance(tags, str) else tags)]
    if TAG not in card.data.tags:
        card.data.tags.append(TAG)
    path.write_text(str(card), encoding="utf-8")


def _lines(
    args: SecondOrderArgumentsMixin,
    mup: MupReport | None,
    optimizer: SecondOrderOptimizer | None,
    notes: Mapping[str, str],
) -> list[str]:
    rows = {"optimizer": f"`{args.optim.value}`", "muP base": "none: standard parametrization"}
    if mup is not None:
        weights = "pretrained weights" if mup.pretrained else "trained from scratch"
        base, own = f"width {mup.base_width}", f"width {mup.width}"
        if mup.depth:
            base, own = f"{base}, {mup.base_depth} layers", f"{own}, {mup.depth} layers"
        rows["muP base"] = f"{base}; this model has {own}, {weights}"
    if optimizer is not None:
        rows["weights"] = optimizer.coverage().summary()
    rows |= {"recipe": "the settings below"} | dict(notes)
    rows["versions"] = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if name in sys.modules)
    written = yaml.safe_dump(settings_in_use(args), sort_keys=False, allow_unicode=True).rstrip()
    return [
        "## Second-order optimizer",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {' '.join(value.split()).replace('|', '/')} |" for name, value in rows.items()),
        "",
        "Flags of `hf-so2 train`, and fields of `hf_so2.SecondOrderTrainingArguments`:",
        "",
        "```yaml",
        written,
        "```",
    ]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "from a folder"
