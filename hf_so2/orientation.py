"""Which dimension of each parameter is fan_out, which is fan_in, and which only enumerates (experts, heads of a block
diagonal)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Orientation:
    """Dimensions of one parameter by what they are to its layer.

    Args:
        fan_out: dimensions whose product is fan_out.
        fan_in: dimensions whose product is fan_in; empty for vectors (gains, biases, per-channel kernels).
        batch: dimensions that enumerate independent matrices. They are no fan, but outputs multiply with them.
        tied: an embedding shares the parameter with a module of another kind, its head.
    """

    fan_out: tuple[int, ...]
    fan_in: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    tied: bool = False


# Bare parameters whose use the module's type does not tell: local name -> (fan_out, fan_in) by class name.
_BARE_MATRICES: dict[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("DbrxExpertGLU", "w2"): ((1,), (0,)),
    ("Gemma3MultiModalProjector", "mm_input_projection_weight"): ((1,), (0,)),
    ("FunnelRelMultiheadAttention", "r_kernel"): ((1, 2), (0,)),
    ("SwiftFormerEfficientAdditiveAttention", "w_g"): ((1,), (0,)),
    **{("XLNetRelativeAttention", name): ((1, 2), (0,)) for name in "qkvr"},
    ("XLNetRelativeAttention", "o"): ((0,), (1, 2)),
}
# Experts stored (expert, fan_in, fan_out) without saying so by an `is_transposed` attribute.
_TRANSPOSED_EXPERTS = frozenset({"Llama4TextExperts", "RecurrentGemmaRglru"})
# Parameters of two and more dimensions that are used entry by entry, or added to something, so that no dimension is
# contracted.
_ELEMENTWISE = frozenset(
    """A_log D dt_bias dt_proj_bias scale static_weight relative_attention_bias r_r_bias r_s_bias r_w_bias seg_embed
    mask_emb position_bias pos_embed rel_pos_h rel_pos_w probe e_score_correction_bias latents""".split()
)
# Bare parameters with one of these in their names are looked up or added: positions, class and mask tokens.
_ADDED = ("bias", "embed", "token")


def orientations(model: nn.Module) -> dict[str, Orientation]:
    """The orientation of every parameter by its name in `model.named_parameters()`.

    A parameter that an embedding shares with other modules is oriented as the embedding has it.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for local, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, local))
    normed = weight_norms(model)
    found = {}
    for name, parameter in model.named_parameters():
        if name in normed:  # the weight of the module that is normalised
            owner = model.get_submodule(name.rpartition(".parametrizations.")[0])
            found[name] = _orient(owner, "weight", parameter)
            continue
        shared = owners[id(parameter)]
        embeddings = [owner for owner in shared if _is_embedding(*owner)]
        module, local = (embeddings or shared)[0]
        if isinstance(module, nn.ParameterList):  # its entries have numbers, its own name says what they are
            local = name
        orientation = _orient(module, local, parameter)
        tied = bool(embeddings) and len(embeddings) < len(shared)
        found[name] = Orientation(orientation.fan_out, orientation.fan_in, orientation.batch, tied)
    return found


def _is_embedding(module: nn.Module, local: str) -> bool:
    """Whether rows of the parameter are looked up, also by a class of the family's own (I-BERT's QuantEmbedding)."""
    if isinstance(module, nn.Embedding):
        return True
    own = vars(module)["_parameters"].get(local)
    is_table = own is not None and own.ndim == 2
    return is_table and local == "weight" and type(module).__name__.endswith("Embedding")


def weight_norms(model: nn.Module) -> dict[str, str]:
    """The names of weights that are normalised, `W = g V / |V|`: that of the gain `g` by that of the direction `V`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList) and name.endswith(".parametrizations.weight"):
            own = dict(module.named_parameters(recurse=False))
            if own.keys() == {"original0", "original1"} and own["original0"].ndim == own["original1"].ndim:
                found[f"{name}.original1"] = f"{name}.original0"
    return found


def _orient(module: nn.Module, local: str, parameter: nn.Parameter) -> Orientation:
    rank, class_name = parameter.ndim, type(module).__name__
    every = tuple(range(rank))
    if (class_name, local) == ("Inkling2BlockAttentionResidual", "query"):
        # Contracted with the stream; several queries make a matrix of it, one query leaves a vector.
        return Orientation(every[:-1], every[-1:])
    if (class_name, local) in _BARE_MATRICES:
        fan_out, fan_in = _BARE_MATRICES[class_name, local]
        return Orientation(fan_out, fan_in)
    if rank < 2 or local in _ELEMENTWISE or (local != "weight" and any(part in local for part in _ADDED)):
        return Orientation(every)
    if isinstance(module, nn.Linear):
        return Orientation((0,), (1,))
    if isinstance(module, Conv1D) or _is_embedding(module, local):
        return Orientation((1,), (0,))
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    is_gain = local != "weight" or (rank > 2 and not is_convolution)
    if is_gain and sum(size > 1 for size in parameter.shape) < 2:
        return Orientation(every)
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == module.in_channels > 1:  # a kernel for each channel
            return Orientation(every)
        return Orientation((1,), (0,)) if module.transposed else Orientation((0,), (1,))
    if rank == 2:
        return Orientation((0,), (1,))
    transposed = getattr(module, "is_transposed", class_name in _TRANSPOSED_EXPERTS)
    second, last = every[-2:-1], every[-1:]
    return Orientation(last, second, every[:-2]) if transposed else Orientation(second, last, every[:-2])
