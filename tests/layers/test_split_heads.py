"""`split_heads`: query, key and value projections whose heads are matrices of their own."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared.helpers import SMALL, assert_same_parameters, gpt2, in_float64, llama, relative_error
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import hf_so2
from hf_so2.layers.parts import projections

GRADIENT_BASED = ("shampoo", "soap", "kl_shampoo", "muon")
SIZE = 8  # of a head
FOUR = {"hidden_size": 4 * SIZE, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 24}
FALCON = {**FOUR, "vocab_size": 32, "alibi": False}
OF_MPT = {"d_model": 4 * SIZE, "n_heads": 4, "n_layers": 1, "vocab_size": 32}
OF_GPT = {"n_embd": 4 * SIZE, "n_head": 4, "n_layer": 1, "vocab_size": 32}
# Sizes of a family, and its number of key heads for four query heads.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {**FOUR, "num_key_value_heads": 2}, 2),
    "opt": ("opt", {**FOUR, "ffn_dim": 24, "word_embed_proj_dim": 32, "vocab_size": 32}, 4),
    "bert": ("bert", FOUR, 4),
    "gpt2": ("gpt2", OF_GPT, 4),
    "gpt_neox": ("gpt_neox", FOUR, 4),
    "bloom": ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 1, "vocab_size": 32}, 4),
    "falcon by head": ("falcon", {**FALCON, "multi_query": False, "new_decoder_architecture": False}, 4),
    "falcon, one key": ("falcon", {**FALCON, "multi_query": True, "new_decoder_architecture": False}, 1),
    "falcon in groups": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    "phi3": ("phi3", {**FOUR, "num_key_value_heads": 2, "pad_token_id": 0}, 2),
    "mpt": ("mpt", OF_MPT, 4),
    "gpt_bigcode, one key": ("gpt_bigcode", {**OF_GPT, "multi_query": True}, 1),
    "gpt_bigcode by head": ("gpt_bigcode", {**OF_GPT, "multi_query": False}, 4),
    "persimmon": ("persimmon", FOUR, 4),
    "modernbert": ("modernbert", {**FOUR, "vocab_size": 32, "pad_token_id": 0}, 4),
}
OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "Wo")


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    model_type, sizes, _ = FAMILIES[family]
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.zeros_(parameter) if name.endswith("bias") else torch.nn.init.normal_(parameter, std=0.3)
    return model


def context_of(model: nn.Module, output: nn.Module) -> Tensor:
    """What the attention's output projection is given, (tokens, heads, size)."""
    found: list[Tensor] = []
    handle = output.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach().clone()))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 10).unsqueeze(0))
    handle.remove()
    return found[0].reshape(-1, 4, SIZE)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_head_are_those_that_this_head_uses(family: str) -> None:
    """Other rows of query `i` change head `i` of the context; those of key and value `j`, the heads that share them.

    Without the rows of a value, these heads are zero.
    """
    model, keys = tiny(family), FAMILIES[family][2]
    seen = set()
    for module, projection in projections(model).items():
        parent = next(m for m in model.modules() if module in m.children())
        output = next((c for n, c in parent.named_children() if n in OUTPUTS), None)
        output = output if output is not None else model.encoder.layer[0].attention.output.dense
        before = context_of(model, output)
        (own_kind,) = {n[0] for n, c in parent.named_children() if c is module} & set("qkv") or {""}
        for head in projection.heads:
            *named, _, number = head.label.split()
            kind = named[0] if named else own_kind
            seen.add((kind, int(number)))
            rows = module.weight.data[:, head.start : head.stop].mT if isinstance(module, Conv1D) else None
            rows = module.weight.data[head.start : head.stop] if rows is None else rows
            kept = rows.clone()
            rows.copy_(kept.flip(0) if kind != "v" else torch.zeros_like(kept))
            after = context_of(model, output)
            rows.copy_(kept)
            share = 1 if kind == "q" else 4 // keys
            users = list(range(int(number) * share, (int(number) + 1) * share))
            changed = (after - before).abs().amax(dim=(0, 2)) > 1e-6
            assert changed.nonzero().flatten().tolist() == users, head
            assert kind != "v" or not after[:, users].any()
    expected = {("q", i) for i in range(4)} | {(kind, i) for kind in "kv" for i in range(keys)}
    assert seen == expected


class Apart(nn.Module):
    """A projection, of which every head is a module."""

    def __init__(self, whole: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        weight = whole.weight.mT if isinstance(whole, Conv1D) else whole.weight
        self.heads = nn.ModuleList(nn.Linear(weight.shape[1], size, bias=whole.bias is not None) for size in sizes)
        for head, rows in zip(self.heads, weight.detach().split(sizes), strict=True):
            head.weight.data = rows.clone()
        if whole.bias is not None:
            for head, part in zip(self.heads, whole.bias.detach().split(sizes), strict=True):
                head.bias.data = part.clone()


def heads_apart(model: nn.Module, names: tuple[str, ...]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names:
                outputs = child.weight.shape[1 if isinstance(child, Conv1D) else 0]
                setattr(module, name, Apart(child, [SIZE] * (outputs // SIZE)))


def neox() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    config = AutoConfig.for_model("gpt_neox", **sizes, hidden_act="gelu", rotary_pct=0.5)
    return AutoModelForCausalLM.from_config(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "llama": (lambda: llama(32, num_hidden_layers=1), ("q_proj", "k_proj", "v_proj")),
    "gpt2": (lambda: gpt2(16, n_layer=1), ("c_attn",)),
    "gpt_neox": (neox, ("query_key_value",)),
}


@pytest.mark.parametrize(
    ("family", "norm_control"),
    [
        *(("llama", control) for control in ("spectral", "graft_adam", "graft_sgd", "kl_clip", "none")),
        ("gpt2", "spectral"),
        ("gpt2", "graft_adam"),
        ("gpt_neox", "spectral"),
    ],
)
@pytest.mark.parametrize("name", GRADIENT_BASED)
def test_a_head_is_updated_as_a_module_with_its_rows_is(family: str, name: str, norm_control: str) -> None:
    make, names = MODELS[family]
    fused, apart = make().double(), make().double()
    heads_apart(apart, names)
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "norm_control": norm_control}
    if name != "muon":
        settings["preconditioner_update_steps"] = 1
    split = hf_so2.build_optimizer(name, fused, split_heads=True, **settings)
    reference = hf_so2.build_optimizer(name, apart, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for parameter in fused.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for key, parameter in apart.named_parameters():
            parameter.grad = rows_of(fused, key, lambda p: p.grad).clone()
        split.step()
        reference.step()
    assert {len(layer.shape) for layer in split.curvature.layers.values()} == {2}
    assert len(split.curvature.layers) == len(reference.curvature.layers)
    for key, parameter in apart.named_parameters():
        # Muon rounds to bfloat16, whose numbers are 4e-3 apart; a transposed weight is rounded in another order.
        assert relative_error(rows_of(fused, key, lambda p: p.data), parameter) < (1e-4 if name == "muon" else 1e-10)


def rows_of(fused: nn.Module, key: str, take: Callable[[nn.Parameter], Tensor]) -> Tensor:
    """Of the model with whole projections, what belongs to a parameter of the one with its heads apart."""
    if ".heads." not in key:
        return take(fused.get_parameter(key))
    name, _, rest = key.partition(".heads.")
    number, local = rest.split(".")
    module = fused.get_submodule(name)
    whole = take(getattr(module, local))
    whole = whole.mT if isinstance(module, Conv1D) and whole.ndim == 2 else whole
    return whole[int(number) * SIZE : (int(number) + 1) * SIZE]


@pytest.mark.parametrize(("name", "family"), [("soap_mup", "llama"), ("shampoo", "gpt2"), ("muon", "gpt_neox")])
def test_going_on_from_a_saved_state_is_going_on(name: str, family: str) -> None:
    make = MODELS[family][0]
    base = {"base_config": make().config} if name.endswith("_mup") else {}

    def built() -> tuple[nn.Module, hf_so2.SecondOrderOptimizer]:
        model = make()
        return model, hf_so2.build_optimizer(name, model, split_heads=True, **base)

    def train(model: nn.Module, optimizer: hf_so2.SecondOrderOptimizer, seeds: range) -> None:
        for seed in seeds:
            tokens = torch.randint(1, 32, (2, 9), generator=torch.Generator().manual_seed(seed))
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, stopped = built(), built()
    train(*straight, range(5))
    train(*stopped, range(3))
    file = io.BytesIO()
    torch.save({"model": stopped[0].state_dict(), "optimizer": stopped[1].state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert any(key.endswith("head 0]") for key in saved["optimizer"]["curvature"]["curvature"]["layers"])
    resumed, optimizer = built()
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(3, 5))
    assert_same_parameters(resumed, straight[0])


def test_the_table_and_the_layers_name_the_heads() -> None:
    optimizer = hf_so2.build_optimizer("shampoo", llama(32, num_hidden_layers=1), split_heads=True)
    reasons = {entry.name.split(".")[-2]: entry.reason for entry in optimizer.coverage().parameters}
    assert reasons["q_proj"] == "weight of Linear, by head: 4 q of 8"
    assert reasons["k_proj"] == "weight of Linear, by head: 2 k of 8"
    assert reasons["o_proj"] == "weight of Linear"
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert [layer.name for layer in optimizer.curvature.layers_of[q_proj]] == [f"{q_proj}[head {i}]" for i in range(4)]
    fused = hf_so2.build_optimizer("shampoo", gpt2(16, n_layer=1), split_heads=True)
    labels = [f"{kind} head {i}" for kind in "qkv" for i in range(2)]
    c_attn = "transformer.h.0.attn.c_attn.weight"
    assert [layer.name for layer in fused.curvature.layers_of[c_attn]] == [f"{c_attn}[{label}]" for label in labels]
    single = hf_so2.build_optimizer("shampoo", llama(16), split_heads=True).coverage().parameters
    (k_proj,) = {entry.reason for entry in single if "k_proj" in entry.name}
    assert k_proj == "weight of Linear, whole: it has a single head"


def test_a_projection_of_unknown_layout_stays_whole_and_the_table_says_why() -> None:
    model = gpt2(16, n_layer=2)

    class Own(type(model.transformer.h[1].attn)):  # type: ignore[misc]
        pass

    model.transformer.h[1].attn.__class__ = Own
    entries = hf_so2.build_optimizer("shampoo", model, split_heads=True).coverage().parameters
    reasons = [entry.reason for entry in entries if entry.name.endswith("c_attn.weight")]
    assert reasons == [
        "weight of Conv1D, by head: 2 q, 2 k, 2 v of 8",
        "weight of Conv1D, whole: the layout of heads in Own.c_attn is not known",
    ]


def test_large_projections_of_small_heads_are_preconditioned_on_both_sides() -> None:
    optimizer = hf_so2.build_optimizer(
        "muon", llama(16, head_dim=16, num_attention_heads=2), split_heads=True, max_preconditioner_dim=24
    )
    found = {entry.name.split(".")[-2]: entry.algorithm for entry in optimizer.coverage().parameters}
    assert (found["q_proj"], found["o_proj"]) == ("muon", "adamw")


@pytest.mark.parametrize("name", ["kfac", "ekfac", "foof", "adamw"])
def test_other_methods_refuse_it(name: str) -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^split_heads=True: has no effect on .* soap, kl_shampoo or"):
        hf_so2.build_optimizer(name, llama(), split_heads=True)


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(hf_so2.ConfigurationError, match=r"^split_heads=True: .* trained query, key or value"):
        hf_so2.build_optimizer("muon", nn.Sequential(nn.Linear(4, 4)), split_heads=True)


@pytest.mark.parametrize(
    ("name", "settings", "needed"),
    [
        ("muon_mup", {"norm_control": "none"}, "norm_control graft_adam, graft_sgd, spectral with muon_mup"),
        ("shampoo_mup", {"norm_control": "kl_clip"}, "norm_control graft_adam"),
        ("shampoo_mup", {"damping_rule": "constant"}, "another damping_rule than constant"),
    ],
)
def test_rates_that_scale_with_the_size_of_a_head_are_refused_under_mup(
    name: str, settings: dict[str, Any], needed: str
) -> None:
    """A record of widths tells how the projection grows, and not whether its heads do."""
    with pytest.raises(hf_so2.ConfigurationError, match=f"^split_heads=True: needs {needed}"):
        hf_so2.build_optimizer(name, llama(), base_config=llama().config, split_heads=True, **settings)


@pytest.mark.parametrize("name", ["muon_mup", "shampoo_mup", "soap_mup", "kl_shampoo_mup"])
def test_under_mup_every_head_gets_its_own_spectral_norm(name: str) -> None:
    """`sqrt(size of a head / fan_in)`, whatever the width."""
    base = llama().config
    model = in_float64(llama(32, num_hidden_layers=1))
    settings = {} if name == "muon_mup" else {"preconditioner_update_steps": 1}
    optimizer = hf_so2.build_optimizer(name, model, base_config=base, split_heads=True, lr=0.5, **settings)
    weight = model.model.layers[0].self_attn.q_proj.weight
    for step in range(3):
        before = weight.detach().clone()
        tokens = torch.randint(1, 32, (4, 9), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for change in (weight.detach() - before).split(SIZE):
        expected = 0.5 * (SIZE / 32) ** 0.5
        assert float(torch.linalg.matrix_norm(change, 2)) == pytest.approx(
            expected, rel=0.3 if name == "muon_mup" else 0.02
        )


def test_a_state_of_whole_projections_is_refused_with_the_settings_name() -> None:
    states = []
    for is_split in (False, True):
        optimizer = hf_so2.build_optimizer("shampoo", llama(), split_heads=is_split)
        states.append((optimizer, optimizer.state_dict()))
    for (optimizer, _), (_, other) in zip(states, reversed(states), strict=True):
        with pytest.raises(ValueError, match="split_heads must be as it was"):
            optimizer.load_state_dict(other)
