"""Prints a page: what each optimizer costs a rank in memory, traffic and FLOPs, from 100M to 70B parameters.

hf-so2 scaling > scaling.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hf_so2 import cli
from hf_so2.benchmark.scaling import KINDS, MODELS, Llama, Load, load

RANKS = (8, 64, 512, 4096)
TOKENS = 4096

HEAD = """# Scaling: who holds and sends what

With w processes under DDP every rank has the whole model. Curvature is spread over them by `gradient_worker_fraction`
f (KAISA's knob, [Pauloski et al. 2021](https://arxiv.org/abs/2107.01739)): of each layer, g = ⌈f·w⌉ ranks, rounded up
to a divisor of w, hold the statistics and the preconditioner; one of these, the owner, refreshes it. Ranks form a
grid of g rows and w/g columns, neighbours in a row; a layer belongs to a column. Owners are chosen by longest
processing time first, from the FLOPs of a refresh and of preconditioning, so that every rank knows them without
asking.

| what | f = 1 (default) | f = 0 |
|---|---|---|
| refreshes a layer | its owner | its owner |
| holds statistics, preconditioner, state of norm control | every rank | its owner |
| preconditions | every rank, every layer | the owner |
| holds the momentum of gradients (`momentum_order="before"`) | every rank, as any optimizer's under DDP | every rank |
| holds the momentum of preconditioned gradients (`"after"`) | every rank | the owner |
| is sent at every update of the statistics (K-FAC family) | S: all-reduce | S: reduced to the owner |
| is sent at every refresh | R: broadcast from the owner | EKFAC's and TEKFAC's bases, else nothing |
| is sent at every step | nothing | U: broadcast from the owner |

For a weight of shape (m, n), with t(n) = n(n+1)/2 for the triangle of a symmetric matrix and 4 bytes per number (8
where the weight is float64):

| method | S | R | U | state on a rank that holds it |
|---|---|---|---|---|
| K-FAC, TKFAC | t(m) + t(n) | t(m) + t(n) | mn | 2(m² + n²) |
| FOOF | t(n) | t(n) | mn | 2n² |
| EKFAC, TEKFAC | t(m) + t(n) + mn | m² + n² + mn + m + n | mn | 2(m² + n²) + mn, of which m² + n² on every rank |
| Shampoo, KL-Shampoo | 0 | t(m) + t(n) | mn | 2(m² + n²) |
| SOAP | 0 | m² + n² + 2mn + m + n | mn | 2(m² + n²) + 2mn, its momentum included |
| Muon | 0 | 0 | mn | 0 |

Gradients are the same on all ranks under DDP, so what is made of them alone needs no sum. SOAP's momentum is kept in
its bases, with its statistics, and only where these are. EKFAC's S is a sum over tokens in the eigenbases, and every
rank needs these for its own tokens. A few numbers per layer are not listed: counts of rows and tokens, flags of what
failed, a scalar here and there. With f above 1/w and the norm control `spectral`, ranks that make the same update tell
each other at every step whether linear algebra has failed, for which all updates are there at the same time: another
copy of the preconditioned weights. Between the ends (1 < g < w) sums are reduced along the rows and then down the
columns, results go down the columns, and updates along the rows. Tensors travel in buckets of at most 64 MiB, a few at
a time; a collective's payload is what is counted here: an all-reduce moves about twice that.

**Which end?** f = 1 where the state fits, and refreshes are rare: off them, nothing is sent but statistics. f = 0
where it does not fit; it also shares the work of preconditioning, which is all there is to share for Muon, at the
price of as many bytes as the gradients have at every step. Every rank still makes each layer's sums over its own
tokens in full, at the steps that update statistics, before they are reduced.

## FSDP2

With sharded parameters (`fully_shard` of your own before `build_optimizer`, `configs/accelerate/fsdp.yaml`, or the
Trainer's `--fsdp`) each rank has one of w parts of parameters, gradients, AdamW's moments and the momentum of
gradients, uneven or empty ones included; not SOAP's momentum, which is whole where its bases are held. What is to be
preconditioned is gathered where the layer is held, one layer of each column or 64 MiB of them at a time, and of the
update every rank gets its part; weight decay and the step are made part by part. Curvature is shared as above.

| what | f = 1 (default) | f = 0 |
|---|---|---|
| whole gradients at a time | a bucket of layers on every rank | the same, of its own layers alone |
| is sent at every step | mn: all-gather | mn/w to the owner from each rank, and as much back |
| besides, at an update of the Shampoo family's statistics | mn: all-gather | mn/w to the owner from each rank |
| besides, at every step with `graft_adam` on momentum | the same | the same |

HSDP (a mesh of replicas and shards) is supported: parts are gathered among the ranks of one replica. A non-finite
gradient in any rank's part skips the step on all. Parameters that FSDP2 does not shard (`ignored_params`) are updated
as under DDP, by gradients that are yours to average. Refused with one line: tensor parallelism and meshes of some
ranks only, FSDP1, parameters offloaded to the host, and `adaptive_damping`, which takes the loss in the middle of a
step. Accelerate leaves FSDP out on machines without GPUs, which is refused as well. `observe_next_step` makes the step
that follows a collective of its own: call it on all ranks. All of this was run on CPUs with gloo, on 2 and 4 ranks, and
on no GPU.

## Equal to one process

Ranks end equal to each other bit for bit. After ten steps with accumulation and uneven last batches, their parameters
are as far as this from those of one process that saw the same global batches, relative to the norm of all parameters:
the largest over f = 0, ½ and 1 (FSDP2: 0 and 1), with and without μP, with statistics at every step and refreshes at
every third.

| method | DDP, 4 ranks, float64 | FSDP2, 2 ranks, float64 | DDP, 4 ranks, float32 |
|---|---|---|---|
| K-FAC | 2.2e-15 | 2.4e-15 | 1.3e-6 |
| EKFAC | 3.3e-14 | 9.5e-14 | 1.1e-5 |
| TKFAC | 2.6e-15 | 2.8e-15 | 1.0e-6 |
| TEKFAC | 6.3e-14 | 2.6e-14 | 1.8e-5 |
| FOOF | 1.9e-15 | 6.8e-16 | 8.1e-7 |
| Shampoo | 1.7e-14 | 1.3e-14 | 2.4e-6 |
| SOAP | 1.5e-9 | 2.3e-10 | 9.4e-5 |
| SOAP but for `o_proj` | 2.0e-14 | - | - |
| KL-Shampoo | 4.7e-14 | 4.8e-14 | 1.1e-5 |
| Muon | 2.8e-16 | 2.0e-16 | 1.0e-3 |
| AdamW | 1.6e-17 | 6.6e-17 | 2.5e-8 |
| SGD | 3.5e-17 | 1.6e-17 | 8.2e-9 |

SOAP's difference is not one of ranks: one process whose gradients are off by one unit of round-off, or that sums the
same rows in another order, ends 8e-11 to 3e-10 from itself, and 2e-9 to 3e-9 with μP. SOAP's update depends on every
single vector of its eigenbases, and of a fresh model's attention output the first gradient G leaves some of them open:
eigenvalues of GGᵀ are 5e-9 of the largest apart there, so that round-off of 2e-16 turns the vectors by up to 1e-8. The
NumPy reference of the tests, which shares no code with the package, differs as much from itself on the gradients of
that weight. Muon rounds to bfloat16, where another float32 may be another number: one process is 2e-4 (2e-3 with μP)
from itself. Tests hold these two to ten times what one process differs from itself, and all others to 1e-10 in float64
and 1e-4 in float32.

## Time

Llama of width 128 and 4 layers, 1,024 tokens per rank and step, statistics at every step, refreshes at every tenth; ten
steps of two ranks with gloo that shared one CPU core with other work, so that only the processor time of rank 0, in
milliseconds per step, means anything, and that to 20 %. *Sharing* is everything in the package's collectives, packing
included; its last column is its share of the time that passed, waiting for the other rank included. Forward and
backward include capture and DDP.

| method | f | MB given | forward, backward | optimizer | sharing | of the time |
|---|---|---|---|---|---|---|
| K-FAC | 1 | 4.9 | 238 | 55 | 28 | 10 % |
| K-FAC | 0 | 7.7 | 294 | 45 | 29 | 11 % |
| EKFAC | 1 | 8.9 | 395 | 120 | 44 | 9 % |
| EKFAC | 0 | 11.7 | 445 | 80 | 42 | 10 % |
| Shampoo | 1 | 0.4 | 251 | 96 | 6 | 3 % |
| Shampoo | 0 | 3.2 | 267 | 75 | 8 | 5 % |
| SOAP | 1 | 1.2 | 256 | 191 | 4 | 2 % |
| SOAP | 0 | 3.2 | 239 | 105 | 7 | 6 % |
| Muon | 1 | 0 | 258 | 121 | 0 | 0 % |
| Muon | 0 | 3.2 | 241 | 70 | 8 | 3 % |

Of K-FAC's 28 ms about 16 go into packing and unpacking triangles, which halves what is sent.

**No overlap with the backward pass.** A layer's sums are complete in the backward pass of the last micro-batch alone,
which a plain loop does not announce, and there once the last of the layer's calls has had its gradient. Collectives
have to start in the same order on every rank, where an expert may be idle on one of them, and in the same order among
DDP's own, which the same backward pass starts. So they would need a process group of their own and buckets that wait
for each other, as DDP's do; two groups at work at the same time are what
[torch's documentation](https://docs.pytorch.org/docs/stable/distributed.html#torch.distributed.new_group) calls unsafe
with NCCL. Statistics are therefore sent in `step()`, in the order of layers; there the next bucket is packed while up
to eight are on their way. Where that takes too long, `factor_update_steps` divides it: layers take turns.

## State dicts

With f < 1, `state_dict()` and `telemetry()` are collectives (the Trainer calls them on every rank): all ranks must
call them. A checkpoint is the same for every f and w, and loads at any other. With FSDP2 the `state` of a
`state_dict()` is of this rank's parts, as with any optimizer: save it per rank, and load it on as many ranks. What the
functions of `torch.distributed.checkpoint.state_dict` save has no curvature, and loading it ends with an error; the
Trainer's checkpoints are complete, and for any number of ranks.

## The cost model

The hidden weights of Llamas under default settings (statistics of the K-FAC family at every second step, refreshes at
every tenth; the Shampoo family's at every step, and at every twentieth), {tokens}
tokens per rank and step. By default a dimension above 8192 leaves the Shampoo family one side and the K-FAC family
nothing; that happens to the MLPs of 8B and 70B. A FLOP count is that of the rank with most, per step, refreshes spread
over the steps (a layer is not split, so that more ranks than layers do not help); an eigendecomposition counts 9n³,
Cholesky's inverse n³. Forward and backward take 6 FLOPs per parameter and token. Tests hold the counts of bytes and
state to what collectives get and tensors take on 1, 2 and 4 ranks, and those of products to torch's own counter.
"""


def table(rows: Iterator[list[str]]) -> str:
    first, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([first, "|---" * (first.count("|") - 1) + "|", *rest])


def rows(columns: list[tuple[str, Callable[[str, Llama], str]]]) -> Iterator[list[str]]:
    yield ["model", "optimizer", *(title for title, _ in columns)]
    for model in MODELS:
        for kind in KINDS:
            yield [model.name, kind, *(cell(kind, model) for _, cell in columns)]


def column(quantity: Callable[[Load], float], ranks: int, fraction: float, unit: float) -> Callable[[str, Llama], str]:
    return lambda kind, model: f"{quantity(load(kind, model, ranks, fraction, TOKENS)) / unit:.3g}"


def memory() -> Iterator[list[str]]:
    def quantity(of: Load) -> float:
        return of.state_bytes

    ends = [("f = 1", column(quantity, 8, 1.0, 1e9))]
    return rows(ends + [(f"f = 0, w = {w}", column(quantity, w, 0.0, 1e9)) for w in RANKS])


def traffic() -> Iterator[list[str]]:
    def quantity(of: Load) -> float:
        return of.sent_bytes

    return rows([(f"f = {f:g}", column(quantity, 8, f, 1e9)) for f in (1.0, 0.0)])


def flops() -> Iterator[list[str]]:
    def refresh(of: Load) -> float:
        return of.refresh_flops

    def held(of: Load) -> float:
        return of.held_flops

    columns = [("tokens' statistics", column(lambda of: of.capture_flops, 1, 1.0, 1e12))]
    columns += [("preconditioning, f = 1", column(held, 8, 1.0, 1e12))]
    columns += [(f"f = 0, w = {w}", column(held, w, 0.0, 1e12)) for w in RANKS]
    return rows(columns + [(f"refresh, w = {w}", column(refresh, w, 1.0, 1e12)) for w in (1, *RANKS)])


def page() -> str:
    """The whole page."""
    work = 6 * TOKENS / 1e12
    sizes = {model.name: sum(m * n for _, (m, n) in model.weights()) for model in MODELS}
    reference = ", ".join(f"{name}: {work * size:.3g}" for name, size in sizes.items())
    return "\n".join(
        [
            HEAD.format(tokens=TOKENS),
            "### State per rank, GB\n",
            table(memory()),
            "\n### Bytes given to collectives per rank and step, GB\n",
            table(traffic()),
            "\n### FLOPs per rank and step, 10¹²\n",
            f"Forward and backward through the hidden weights, for comparison: {reference}.\n",
            table(flops()),
        ]
    )


def main() -> None:
    """Prints the page."""
    cli.OneLineParser(description=__doc__, formatter_class=cli.AsWritten).parse_args()
    print(page())
