"""Which causal language models of the installed transformers can be put into muP, family by family.

    hf-so2 mup-coverage --markdown docs/measurements/mup_coverage.md --json out/mup_coverage.json

Every type of AutoModelForCausalLM is built tiny, scaled to twice its width, classified, patched, trained for one step
with adamw_mup, saved and loaded again by plain transformers, and once more twice as deep. A stage that fails must do so
by a named refusal; anything else counts as a crash. Takes a few minutes on one core. Exit code 1 when anything crashed.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_so2 import cli
from hf_so2.errors import ConfigurationError
from hf_so2.mup import MupReport, apply_mup, infer_widths, read_mup, scale_depth, scale_width
from hf_so2.mup.rules import init_multiplier
from hf_so2.mup.tiny import tiny_config
from hf_so2.optim import build_optimizer

STAGES = ("built", "scales", "classifies", "patches", "initialises", "trains", "reloads")
MULTIPLIER = 2
SEQUENCE = 16


@dataclass
class Family:
    """How far one model type got.

    Args:
        model_type: key of AutoModelForCausalLM's mapping.
        passed: stages passed, in order.
        outcome: `ok`, `refused` (a ConfigurationError), `transformers` (the unpatched model fails alike) or `crash`.
        reason: the message that ended it.
        roles: number of parameters by role.
        notes: what apply_mup did beside rescaling.
        depth: `yes` if the same stages go well at twice the depth, or why not; empty if that was not tried.
    """

    model_type: str
    passed: list[str] = field(default_factory=list)
    outcome: str = "ok"
    reason: str = ""
    roles: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    depth: str = ""


def examine(model_type: str) -> Family:
    """Takes one type through all stages; never raises for what a family does."""
    family = Family(model_type)
    try:
        base_model = build(tiny_config(model_type))
    except Exception as error:  # noqa: BLE001 - whatever a family's own code raises is its outcome
        family.outcome, family.reason = "transformers", _one_line(error)
        return family
    family.passed.append("built")
    try:
        _examine(family, base_model.config, type(base_model))
    except ConfigurationError as error:
        family.outcome, family.reason = "refused", _one_line(error)
    except Exception as error:  # noqa: BLE001 - a crash is what this script looks for
        family.outcome = "transformers" if _fails_unpatched(base_model, family.passed[-1]) else "crash"
        family.reason = _one_line(error)
    if family.outcome == "ok":
        _examine_depth(family, base_model.config, type(base_model))
    return family


def _examine_depth(family: Family, base: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    try:
        torch.manual_seed(0)
        model = model_class(scale_depth(base, multiplier=MULTIPLIER))
        report = apply_mup(model, base)
        train_one_step(model, base)
        check_reload(model)
    except ConfigurationError as error:
        family.depth = _one_line(error)
    except Exception as error:  # noqa: BLE001 - as above
        family.outcome, family.reason = "crash", f"at twice the depth: {_one_line(error)}"
    else:
        family.depth = "yes" if report.depth else "not deeper"


def _examine(family: Family, base: PretrainedConfig, model_class: type[PreTrainedModel]) -> None:
    config = scale_width(base, multiplier=MULTIPLIER)
    family.passed.append("scales")
    torch.manual_seed(0)
    model = model_class(config)
    family.roles = dict(Counter(width.role for width in infer_widths(model, base).values()))
    if not family.roles.get("hidden"):
        raise ConfigurationError("model_type", family.model_type, "has no hidden weight that grows with the width")
    family.passed.append("classifies")
    report = apply_mup(model, base)
    family.notes = list(report.notes)
    family.passed.append("patches")
    check_initialisation(model, base, report)
    family.passed.append("initialises")
    train_one_step(model, base)
    family.passed.append("trains")
    check_reload(model)
    family.passed.append("reloads")


def build(config: PretrainedConfig) -> PreTrainedModel:
    """A fresh model of AutoModelForCausalLM's class; where that takes a part of a composite config, of that part."""
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if model_class.config_class not in (type(config), None):
        return model_class(config.get_text_config(decoder=True))
    return AutoModelForCausalLM.from_config(config)


def check_initialisation(model: PreTrainedModel, base: PretrainedConfig, report: MupReport) -> None:
    """Compares standard deviations with those of a freshly drawn base model, times the table's factor."""
    torch.manual_seed(1)
    base_weights = dict(type(model)(base).named_parameters())
    for name, parameter in model.named_parameters():
        width, before = report[name], base_weights[name]
        if width.role not in ("input", "hidden", "output") or parameter.ndim < 2:
            continue
        wanted = _deviation(before) * init_multiplier(width)
        sampling = 5 * math.sqrt(0.5 / parameter.numel() + 0.5 / before.numel())
        if wanted > 0 and abs(math.log(max(_deviation(parameter), 1e-30) / wanted)) > sampling + 0.02:
            raise AssertionError(f"{name} has standard deviation {_deviation(parameter):.4g} instead of {wanted:.4g}")


def _deviation(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def train_one_step(model: PreTrainedModel, base: PretrainedConfig | None) -> None:
    """One step on random tokens; without a base in the standard parametrization."""
    optimizer = build_optimizer("adamw" if base is None else "adamw_mup", model, base_config=base, lr=1e-3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    tokens = _tokens(model)
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    if not torch.isfinite(loss) or not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise AssertionError(f"loss {float(loss):.4g}, or a parameter, is not finite after one step")
    if not moved:
        raise AssertionError("no parameter moved in one step")


def check_reload(model: PreTrainedModel) -> None:
    """Saves, loads with plain transformers and compares logits; the record must come along."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loader = AutoModelForCausalLM if type(model.config) in AutoModelForCausalLM._model_mapping else type(model)
        loaded = loader.from_pretrained(folder)
    saved_logits, loaded_logits = _logits(model), _logits(loaded)
    difference = float((saved_logits - loaded_logits).abs().max())
    if difference > 1e-6 * float(saved_logits.abs().max()):
        raise AssertionError(f"logits differ by {difference:.3g} after a reload")
    if "so2_mup" in vars(model.config) and read_mup(loaded) != read_mup(model):
        raise AssertionError("the record is lost in a reload")


def _logits(model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=_tokens(model), use_cache=False).logits


def _tokens(model: PreTrainedModel) -> torch.Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary - 3, (2, SEQUENCE), generator=generator)


def _fails_unpatched(model: PreTrainedModel, last_passed: str) -> bool:
    """Whether the family's own model fails where the patched one did."""
    try:
        if last_passed in ("patches", "initialises"):
            train_one_step(model, None)
        elif last_passed == "trains":
            check_reload(model)
        else:
            return False
    except Exception:  # noqa: BLE001 - the question is only whether it fails
        return True
    return False


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {text}"[:200]


def markdown(families: Sequence[Family]) -> str:
    """The table and its summary as a page."""
    counts = {stage: sum(stage in family.passed for family in families) for stage in STAGES}
    outcomes = Counter(family.outcome for family in families)
    lines = [
        "# Coverage of muP over causal language models",
        "",
        f"transformers {transformers.__version__}, {len(families)} types, each tiny and {MULTIPLIER} times as wide",
        "as its base. Made by `hf-so2 mup-coverage --markdown docs/measurements/mup_coverage.md`.",
        "",
        "| " + " | ".join(STAGES) + " |",
        "|" + "---|" * len(STAGES),
        "| " + " | ".join(str(counts[stage]) for stage in STAGES) + " |",
        "",
        f"Passed everything: {outcomes['ok']}. Refused by name: {outcomes['refused']}. Not possible in transformers "
        f"itself: {outcomes['transformers']}. Crashed: {outcomes['crash']}.",
        f"Twice as deep as well: {sum(family.depth == 'yes' for family in families)}.",
        "",
        "*built*: transformers builds the tiny configuration. *scales*: `scale_width` doubles it. *classifies*: every",
        "parameter has a role, and some are hidden. *patches*: `apply_mup`. *initialises*: the measured standard",
        "deviations are the base's times the table's factor. *trains*: one step of adamw_mup, finite. *reloads*: plain",
        "transformers computes the same logits. *depth*: patched, trained and reloaded at twice the depth, or why not.",
        "",
        "| type | reached | roles | beside rescaling, or why it ended | depth |",
        "|---|---|---|---|---|",
    ]
    for family in families:
        reached = (
            "all"
            if family.outcome == "ok"
            else f"{family.passed[-1] if family.passed else 'nothing'} ({family.outcome})"
        )
        roles = ", ".join(f"{count} {role}" for role, count in sorted(family.roles.items()))
        remark = (family.reason or "; ".join(family.notes)).replace("|", "\\|")
        depth = family.depth.replace("|", "\\|")
        lines.append(f"| {family.model_type} | {reached} | {roles} | {remark} | {depth} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Examines the types asked for and writes what was found; 1 when one crashed."""
    parser = cli.OneLineParser(description=__doc__, formatter_class=cli.AsWritten)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--markdown", type=Path, help="page to write")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.types) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    if unknown:
        raise ConfigurationError("types", unknown, "must be causal language models of transformers")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    families = []
    for model_type in arguments.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        family = examine(model_type)
        families.append(family)
        print(f"{family.model_type:24} {family.outcome:12} {family.reason or '; '.join(family.notes)}", flush=True)
    text = markdown(families)
    for path, content in (
        (arguments.markdown, text),
        (arguments.json, json.dumps([asdict(f) for f in families], indent=1)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    print("\n".join(text.splitlines()[5:10]))
    return 1 if any(family.outcome == "crash" for family in families) else 0
