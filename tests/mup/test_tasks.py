"""μP of what is no causal language model: encoders, encoder-decoders, vision and speech, by task."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_so2 import apply_mup, build_optimizer, scale_width
from hf_so2.commands.coverage import TASKS, examine
from hf_so2.mup.roles import build_on_meta, infer_widths
from hf_so2.mup.rules import ADAM, learning_rate_multiplier

ENCODERS = ("bert", "roberta", "modernbert", "deberta", "deberta-v2", "electra", "distilbert")
NAMED = {
    "masked-lm": ENCODERS,
    "sequence-classification": (*ENCODERS, "bart", "t5"),
    "token-classification": ENCODERS,
    "question-answering": (*ENCODERS, "t5"),
    "seq2seq-lm": ("t5", "mt5", "bart", "pegasus", "marian"),
    "image-classification": ("vit", "dinov2", "swin", "convnext", "beit"),
    "audio-classification": ("wav2vec2", "hubert", "whisper"),
    "ctc": ("wav2vec2", "hubert"),
    "speech-seq2seq": ("whisper",),
}
QUICK = [
    ("sequence-classification", "bert"),
    ("question-answering", "distilbert"),
    ("seq2seq-lm", "t5"),
    ("image-classification", "beit"),
    ("ctc", "wav2vec2"),
]
ALL = [(task, family) for task, families in NAMED.items() for family in families]


def check(task_name: str, family: str) -> None:
    found = examine(TASKS[task_name], family)
    assert (found.outcome, found.reason) == ("ok", "")
    assert found.depth == "yes" or found.depth.startswith("base_config=") or "layers" in found.depth


@pytest.mark.parametrize(("task_name", "family"), QUICK)
def test_every_stage(task_name: str, family: str) -> None:
    check(task_name, family)


@pytest.mark.slow
@pytest.mark.parametrize(("task_name", "family"), [case for case in ALL if case not in QUICK])
def test_every_stage_of_every_named_family(task_name: str, family: str) -> None:
    check(task_name, family)


@pytest.mark.slow
@pytest.mark.parametrize("task_name", [name for name in TASKS if name != "causal-lm"])
def test_no_family_crashes(task_name: str) -> None:
    outcomes = {family: examine(TASKS[task_name], family) for family in TASKS[task_name].types}
    assert {family: found.reason for family, found in outcomes.items() if found.outcome == "crash"} == {}
    assert sum(found.outcome == "ok" for found in outcomes.values()) > len(outcomes) // 2


def tiny(task_name: str, family: str, multiplier: int = 1) -> tuple[PreTrainedModel, Any]:
    torch.manual_seed(0)
    model = TASKS[task_name].build(TASKS[task_name].config(family))
    if multiplier == 1:
        return model, model.config
    torch.manual_seed(0)
    return type(model)(scale_width(model.config, multiplier=multiplier)), model.config


@pytest.mark.parametrize(("task_name", "family"), QUICK)
def test_the_base_computes_what_it_did(task_name: str, family: str) -> None:
    model, base = tiny(task_name, family)
    model.eval()
    before = TASKS[task_name].outputs(model)[0]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not apply_mup(model, base).notes
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(TASKS[task_name].outputs(model)[0], before)


def by_shapes(model: nn.Module, base: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, role) of what plain layers hold, by the growth of inputs and outputs that the layers themselves tell."""
    layers: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
    for name, layer in model.named_modules():
        other = base.get_submodule(name)
        if not isinstance(layer, layers) or not isinstance(layer.weight, nn.Parameter):
            continue
        if isinstance(layer, nn.Linear):
            grows_in, grows_out = layer.in_features != other.in_features, layer.out_features != other.out_features
        elif isinstance(layer, nn.Embedding):
            grows_in, grows_out = False, layer.embedding_dim != other.embedding_dim
        else:
            per_group = layer.in_channels // layer.groups, other.in_channels // other.groups
            grows_in, grows_out = per_group[0] != per_group[1], layer.out_channels != other.out_channels
            if layer.groups == layer.in_channels > 1:  # a kernel a channel
                yield f"{name}.weight", "vector"
                continue
        names = {(False, False): "scalar", (False, True): "input", (True, True): "hidden", (True, False): "output"}
        yield f"{name}.weight", names[grows_in, grows_out]


# Two widths of one family as one would write them by hand: every width is three times as large, and nothing else.
BY_HAND: dict[str, tuple[type[PreTrainedModel], Callable[[int], Any], dict[str, str]]] = {
    "bert": (
        BertForSequenceClassification,
        lambda m: BertConfig(
            vocab_size=64,
            hidden_size=16 * m,
            num_hidden_layers=1,
            num_attention_heads=2 * m,
            intermediate_size=32 * m,
            num_labels=5,
        ),
        {"bert.pooler.dense.weight": "hidden", "classifier.weight": "output"},
    ),
    "t5": (
        T5ForConditionalGeneration,
        lambda m: T5Config(vocab_size=64, d_model=16 * m, d_kv=8, d_ff=32 * m, num_layers=1, num_heads=2 * m),
        {
            "shared.weight": "input",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "input",
            "encoder.block.0.layer.1.DenseReluDense.wi.weight": "hidden",
        },
    ),
    "vit": (
        ViTForImageClassification,
        lambda m: ViTConfig(
            hidden_size=16 * m,
            num_hidden_layers=1,
            num_attention_heads=2 * m,
            intermediate_size=32 * m,
            image_size=16,
            patch_size=4,
        ),
        {
            "vit.embeddings.patch_embeddings.projection.weight": "input",
            "vit.embeddings.position_embeddings": "vector",
            "vit.embeddings.cls_token": "vector",
            "classifier.weight": "output",
        },
    ),
    "wav2vec2": (
        Wav2Vec2ForCTC,
        lambda m: Wav2Vec2Config(
            vocab_size=16,
            hidden_size=32 * m,
            num_hidden_layers=1,
            num_attention_heads=2 * m,
            intermediate_size=32 * m,
            conv_dim=(8, 8),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        {
            "wav2vec2.feature_extractor.conv_layers.1.conv.weight": "scalar",
            "wav2vec2.feature_projection.projection.weight": "input",
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original0": "vector",
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": "hidden",
            "wav2vec2.masked_spec_embed": "vector",
            "lm_head.weight": "output",
        },
    ),
}


@pytest.mark.parametrize("family", BY_HAND)
def test_roles_are_those_of_two_widths_written_by_hand(family: str) -> None:
    model_class, config, named = BY_HAND[family]
    model, base = build_on_meta(model_class, config(3)), build_on_meta(model_class, config(1))
    widths = infer_widths(model, config(1))
    names = {id(p): name for name, p in model.named_parameters()}
    for name, role in by_shapes(model, base):
        width = widths[names[id(model.get_parameter(name))]]
        assert width.role == role or (width.tied and role == "output"), name
        assert {width.m_in, width.m_out} <= {1.0, 3.0}
    assert {name: widths[name].role for name in named} == named


def test_a_tied_head_of_t5_is_fed_what_the_base_is() -> None:
    """After its last norm T5 divides by the root of the width; what is missing to 1 / width is folded into the norm."""
    model, base = tiny("seq2seq-lm", "t5", multiplier=4)
    fed: list[Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].detach()))
    apply_mup(model, base)
    TASKS["seq2seq-lm"].outputs(model.eval())
    assert base.d_model == 32
    assert float(fed[-1].square().mean().sqrt()) == pytest.approx(32**-0.5 / 4, rel=1e-3)


def test_the_gain_of_a_weight_norm_grows_with_its_direction() -> None:
    """Wav2Vec2's convolution of positions: `W = g V / |V|` has entries as a hidden weight's, and `g` is `|V|`."""
    model, base = tiny("ctc", "wav2vec2", multiplier=4)
    report = apply_mup(model, base)
    prefix = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original"
    gain, direction = (model.get_parameter(prefix + end) for end in "01")
    torch.testing.assert_close(gain, direction.norm(dim=(0, 1), keepdim=True))
    before = dict(tiny("ctc", "wav2vec2")[0].named_parameters())[prefix + "1"]
    assert float((direction.std() / before.std()).detach()) == pytest.approx(1 / 2, rel=0.05)
    assert learning_rate_multiplier(ADAM, report[prefix + "0"]) == pytest.approx(2)
    assert learning_rate_multiplier(ADAM, report[prefix + "1"]) == pytest.approx(1 / 4)


# What kfac_mup preconditions: every projection of the layers; heads over a vocabulary, convolutions and tables are not.
@pytest.mark.parametrize(
    ("task_name", "family", "yes", "no"),
    [
        ("sequence-classification", "bert", ("query.weight", "pooler.dense.weight", "classifier.weight"), "embeddings"),
        ("seq2seq-lm", "t5", ("EncDecAttention.q.weight", "DenseReluDense.wo.weight"), "relative_attention_bias"),
        ("image-classification", "vit", ("fc1.weight", "classifier.weight"), "projection"),
        ("ctc", "wav2vec2", ("attention.q_proj.weight", "feature_projection.projection.weight"), "conv"),
    ],
)  # fmt: skip
def test_a_step_of_kfac(task_name: str, family: str, yes: tuple[str, ...], no: str) -> None:
    model, base = tiny(task_name, family, multiplier=2)
    optimizer = build_optimizer("kfac_mup", model.train(), base_config=base, lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    TASKS[task_name].loss(model).backward()
    optimizer.step()
    assert optimizer.curvature is not None
    layers = list(optimizer.curvature.layers)
    for end in yes:
        assert any(name.endswith((end, end.removesuffix(".weight"))) for name in layers), (end, layers)
    assert not [name for name in layers if no in name.replace("feature_projection.projection", "")]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert all(any(name.startswith(layer.removesuffix(".weight")) for name in moved) for layer in layers)


def changes(model: PreTrainedModel, base: Any, name: str, optim: str, steps: int = 4) -> dict[str, float]:
    """Root mean square change of the outputs of all plain layers since step 0, by role; of heads `ΔW x`.

    What a head computes of a change of its input falls at first as random sums do, the more so where it is tied to an
    embedding with entries of 1 (T5): its own change is what shall be level.
    """
    settings = {"lr": 3e-3} if optim == "adamw_mup" else {}
    optimizer = build_optimizer(optim, model, base_config=base, **settings)
    task, widths = TASKS[name], infer_widths(model, base)
    names = {id(p): own for own, p in model.named_parameters()}
    seen: list[tuple[str, Tensor]] = []

    def watch(module: nn.Module, role: str) -> None:
        start = module.weight.detach().clone()

        def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            own = isinstance(module, nn.Linear) and role == "output"
            value = nn.functional.linear(inputs[0], module.weight.detach() - start) if own else output
            seen.append((role, value.detach().clone()))

        module.register_forward_hook(record)

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and id(weight) in names:
            width = widths[names[id(weight)]]
            watch(module, "output" if width.tied and not isinstance(module, nn.Embedding) else width.role)

    def observe() -> list[tuple[str, Tensor]]:
        seen.clear()
        with torch.no_grad():
            task.outputs(model.eval())
        return list(seen)

    first = observe()
    for _ in range(steps):
        optimizer.zero_grad()
        task.loss(model).backward()
        optimizer.step()
    squares: dict[str, list[float]] = defaultdict(list)
    for (role, before), (_, after) in zip(first, observe(), strict=True):
        squares[role].append(float((after - before).double().square().mean()))
    # Every layer counts alike, also those with small outputs.
    return {
        role: math.exp(sum(math.log(max(value, 1e-30)) for value in values) / len(values) / 2)
        for role, values in squares.items()
    }


def exponents(name: str, family: str, optim: str, factors: tuple[int, ...] = (1, 2, 4, 8)) -> dict[str, float]:
    """The power of the width with which outputs change, by role; least squares in logarithms over two seeds."""
    seeds = 2
    logs: dict[str, list[list[float]]] = defaultdict(list)
    for factor in factors:
        by_role: dict[str, list[float]] = defaultdict(list)
        for seed in range(seeds):
            base = tiny(name, family)[1]
            torch.manual_seed(seed)
            model = type(tiny(name, family)[0])(scale_width(base, multiplier=factor))
            for role, value in changes(model, base, name, optim).items():
                by_role[role].append(math.log(value))
        for role, values in by_role.items():
            logs[role].append([math.log(factor), sum(values) / len(values)])
    found = {}
    for role, points in logs.items():
        x, y = torch.tensor(points, dtype=torch.float64).T
        found[role] = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_mup", "kfac_mup"])
@pytest.mark.parametrize(
    ("task_name", "family"),
    [
        ("sequence-classification", "bert"),
        ("seq2seq-lm", "t5"),
        ("image-classification", "vit"),
        ("ctc", "wav2vec2"),
    ],
)
def test_changes_are_level_in_the_width(task_name: str, family: str, optim: str) -> None:
    found = exponents(task_name, family, optim)
    print(task_name, family, optim, {role: round(power, 3) for role, power in found.items()})
    for role in ("input", "hidden", "output"):
        assert abs(found[role]) < 0.25, found
