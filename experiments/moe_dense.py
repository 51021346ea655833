"""Mixture of experts against dense language models at equal step time (arXiv:2405.15052).

Run: python -m axrepro.launch --experiment=moe_29b --workdir=gs://BUCKET/moe_29b
The paper's text, batch size, learning rate and exact shapes are not public. Shapes here follow from the model names:
depth and width with 12 L d^2 weights outside the embedding, head dim 128, SwiGLU of 8 d / 3 rounded to a multiple of
128. Optimizer and initial values are those of the "envy" family that the authors released in axlearn; tokens are 20 per
dense parameter. Expected scores: to be measured.
"""

from dataclasses import replace
from functools import partial

from axrepro.core.config import override, swap
from axrepro.core.sharding import Rules
from axrepro.data import Decontaminated, PythonStdlib
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM, llama
from axrepro.nn import MoE, RoPE, RouterLosses, TopK, every
from axrepro.nn.moe import GATHER_REDUCE
from axrepro.optim import AdamW, Cosine, mup_simple
from axrepro.study.study import Arm, Direction, Expectation, Measure, Outlook, Rung, Series, Study
from axrepro.train.conversion import Upcycle
from axrepro.train.experiment import Experiment
from experiments._pretraining import mesh_rules, pretraining, small

_ROUTER = TopK(k=2, losses=RouterLosses(balance=0.01, z=0.001))  # as the paper's secondary sources give them

_HIDDEN_WEIGHTS = ("layers/**/attention/*", "layers/**/gate", "layers/**/up", "layers/**/down")


def _language_model(model: CausalLM, parameters: float) -> Experiment:
    """A paper-scale run: 4M tokens a batch, 20 tokens per parameter."""
    return pretraining(
        LanguageModel(model=model, z_weight=1e-6),
        tokens=20 * parameters,
        batch_size=1024,
        sequence_length=4096,
        optimizer=AdamW(
            learning_rate=Cosine(peak=0.01, warmup=5000, floor=0.005),
            decay="decoupled",
            weight_decay=1e-4,
            update_scale=mup_simple(model.dim, _HIDDEN_WEIGHTS),
        ),
        rules=mesh_rules(),
    )


def _dense(dim: int, num_layers: int, hidden: int, parameters: float) -> Experiment:
    rope = RoPE(base=500_000.0)
    heads = dim // 128
    model = llama(
        vocab_size=32768, dim=dim, num_layers=num_layers, num_heads=heads, hidden=hidden, rope=rope, eps=1e-5, tied=True
    )
    return _language_model(model, parameters)


def _sparse(dense: Experiment, num_experts: int, k: int = 4) -> Experiment:
    """The same backbone with experts in the last of every k blocks, and an expert axis for them.

    Groups of 1,024 tokens: dispatch costs 2 S / 3 H of the experts' products for groups of S, and in smaller ones fewer
    tokens find room. With 64 devices along `expert` each holds an expert or a few, and hardly any weight of theirs is
    gathered; with what experts get and give kept, nothing is exchanged twice.
    """
    moe = every(
        dense,
        k,
        lambda ffn: MoE(expert=ffn, num_experts=num_experts, router=_ROUTER, capacity_factor=2.0, group_size=1024),
    )
    kept = "save:q,k,v,attention_out,moe_in,moe_out,moe_routing"
    return replace(moe, mesh_rules=mesh_rules(expert=64, remat=kept))


def dense_6b() -> Experiment:
    """Dense, 6.4B parameters outside the embedding."""
    return _dense(dim=4096, num_layers=32, hidden=10880, parameters=6.4e9)


def dense_13b() -> Experiment:
    """Dense, 12.6B parameters outside the embedding."""
    return _dense(dim=5120, num_layers=40, hidden=13696, parameters=12.6e9)


def dense_29b() -> Experiment:
    """Dense, 29.6B parameters outside the embedding."""
    return _dense(dim=7168, num_layers=48, hidden=19072, parameters=29.6e9)


def moe_6b() -> Experiment:
    """The 6.4B backbone, 64 experts in every 4th block."""
    return _sparse(dense_6b(), num_experts=64)


def moe_6b_every1() -> Experiment:
    """The 6.4B backbone, 64 experts in every block."""
    return _sparse(dense_6b(), num_experts=64, k=1)


def moe_6b_every2() -> Experiment:
    """The 6.4B backbone, 64 experts in every 2nd block."""
    return _sparse(dense_6b(), num_experts=64, k=2)


def moe_13b() -> Experiment:
    """The 12.6B backbone, 64 experts in every 4th block."""
    return _sparse(dense_13b(), num_experts=64)


def moe_29b() -> Experiment:
    """The 29.6B backbone, 64 experts in every 4th block."""
    return _sparse(dense_29b(), num_experts=64)


def moe_1p6b_256e() -> Experiment:
    """A 1.6B backbone, 256 experts in every 4th block: the paper's step-time match for dense 6.4B."""
    return _sparse(_dense(dim=2048, num_layers=32, hidden=5504, parameters=1.6e9), num_experts=256)


def dense_tiny() -> Experiment:
    """Byte-level dense model on the text of Python's standard library; minutes on two CPU cores."""
    model = llama(vocab_size=264, dim=128, num_layers=4, num_heads=4, hidden=344, tied=True)
    experiment = small(model, sequence_length=256, steps=1000)
    return override(experiment, {"method.model.layers.unroll": 4})  # a short stack on CPU is faster written out


def moe_tiny() -> Experiment:
    """The same with 8 experts, top-2, in every second block: what `make train` trains."""
    return every(dense_tiny(), 2, lambda ffn: MoE(expert=ffn, num_experts=8, router=_ROUTER))


def moe_tiny_upcycled() -> Experiment:
    """moe_tiny from a trained dense_tiny (train.init_from), half of each expert's hidden units drawn anew."""
    conversion = Upcycle(reinitialise=0.5)
    experiment = moe_tiny()
    return replace(experiment, train=replace(experiment.train, init_from="runs/dense_tiny", conversion=conversion))


def tiny() -> Experiment:
    """The smallest of the family, for tests."""
    smaller = {"method.model.dim": 64, "data.sequence_length": 64, "train.steps": 60, "data.batch_size": 8}
    return override(moe_tiny(), smaller)


def _rung(dim: int, num_heads: int) -> Experiment:
    """Four blocks of this width, bytes of the standard library: a scale at which a study takes minutes on a CPU.

    One learning rate for all widths, as the released family has; AdamW of `small`. Steps are for a single run: a study
    sets them by its budget.
    """
    hidden = 8 * round(dim / 3)
    model = llama(vocab_size=264, dim=dim, num_layers=4, num_heads=num_heads, hidden=hidden, tied=True)
    changes = {
        "method.model.layers.unroll": 4,
        "data.batch_size": 16,
        "data.source.holdout": 100,
        "optimizer.learning_rate.peak": 5e-3,
        "train.log_every": 20,
        "checkpoint.every": 500,
        "eval.every": 100,
        "eval.batches": 8,
    }
    experiment = override(small(model, sequence_length=128, steps=600), changes)
    return swap(experiment, PythonStdlib, lambda source: Decontaminated(source=source))


def _sparse_rung(dense: Experiment, num_experts: int = 8, k: int = 2) -> Experiment:
    moe = lambda ffn: MoE(expert=ffn, num_experts=num_experts, router=_ROUTER, eval_capacity_factor=2.0)
    return every(dense, k, moe)


def dense_28k() -> Experiment:
    """Dense, 28k parameters outside the embedding: the lowest rung of the study's ladder."""
    return _rung(dim=24, num_heads=1)


def dense_50k() -> Experiment:
    """Dense, 50k parameters outside the embedding."""
    return _rung(dim=32, num_heads=2)


def dense_76k() -> Experiment:
    """Dense, 76k parameters outside the embedding."""
    return _rung(dim=40, num_heads=2)


def dense_150k() -> Experiment:
    """Dense, 150k parameters outside the embedding: its step takes longer than that of any mixture of the ladder."""
    return _rung(dim=56, num_heads=4)


def moe_28k() -> Experiment:
    """The 28k backbone, 8 experts in every second block."""
    return _sparse_rung(dense_28k())


def moe_28k_every1() -> Experiment:
    """The 28k backbone, 8 experts in every block."""
    return _sparse_rung(dense_28k(), k=1)


def moe_28k_every4() -> Experiment:
    """The 28k backbone, 8 experts in the last of its four blocks."""
    return _sparse_rung(dense_28k(), k=4)


def moe_50k() -> Experiment:
    """The 50k backbone, 8 experts in every second block."""
    return _sparse_rung(dense_50k())


def moe_76k() -> Experiment:
    """The 76k backbone, 8 experts in every second block."""
    return _sparse_rung(dense_76k())


_EXPERTS = "method.model.layers.layer.layers.3.ffn"  # of moe_6b
_MIXTURE = "method.model.layers.layer.layers.1.ffn"  # of moe_28k


def _varied(experiment: str, mixture: str, label: str, x: float | None = None, **changes: str | float) -> Arm:
    """An experiment with fields of its mixtures changed, "router.losses.z" as router__losses__z."""
    fields = tuple((f"{mixture}.{name.replace('__', '.')}", str(value)) for name, value in changes.items())
    return Arm(label=label, experiment=experiment, changes=fields, x=x)


_moe_6b = partial(_varied, "moe_6b", _EXPERTS)
_moe_28k = partial(_varied, "moe_28k", _MIXTURE)


def _experts(num_experts: int, devices: int) -> Arm:
    """moe_6b with another number of experts, which lie on so many devices."""
    arm = _moe_6b(f"{num_experts} experts", num_experts, num_experts=num_experts)
    return replace(arm, changes=(*arm.changes, ("mesh.expert", str(devices))))


def _outlook() -> Outlook:
    """The scales of the paper, and at the smallest of them what a mixture is made of."""
    dense = Arm(label="dense 6.4B", experiment="dense_6b")
    every_4th = Arm(label="every 4th block", experiment="moe_6b", x=4)
    table = ("rules.table", repr(Rules().replace(**GATHER_REDUCE).table))
    gather = Arm(label="gather and reduce", experiment="moe_6b", changes=(table,))
    of_16 = replace(gather, changes=(table, ("mesh.expert", "16")))  # the mesh of the released experiments
    dropless = _moe_6b("dropless", dispatch="dropless", buffer_factor="1.25")
    return Outlook(
        ladder=(
            Rung(
                name="6.4B",
                dense=dense,
                sparse=(
                    Arm(label="6.4B, 64 experts", experiment="moe_6b"),
                    Arm(label="1.6B, 256 experts", experiment="moe_1p6b_256e"),
                ),
            ),
            Rung(
                name="12.6B",
                dense=Arm(label="dense 12.6B", experiment="dense_13b"),
                sparse=(Arm(label="12.6B, 64 experts", experiment="moe_13b"),),
            ),
            Rung(
                name="29.6B",
                dense=Arm(label="dense 29.6B", experiment="dense_29b"),
                sparse=(Arm(label="29.6B, 64 experts", experiment="moe_29b"),),
            ),
        ),
        series=(
            Series(
                name="experts",
                dense=dense,
                arms=(  # over a whole side of v5p-1024, 8 x 8 x 8 chips, or of v6e-256, 16 x 16
                    _experts(8, 8),
                    _experts(16, 8),
                    _experts(16, 16),
                    _experts(32, 8),
                    _experts(32, 32),
                    *(_experts(n, 64) for n in (64, 128, 256)),
                ),
            ),
            Series(
                name="capacity factor",
                dense=dense,
                arms=tuple(_moe_6b(f"capacity {c}", c, capacity_factor=c) for c in (1.0, 1.25, 1.5, 2.0)),
            ),
            Series(
                name="experts per token",  # with the same room for each choice
                dense=dense,
                arms=tuple(_moe_6b(f"top-{k}", k, router__k=k, capacity_factor=float(k)) for k in (1, 2)),
            ),
            Series(
                name="blocks per mixture",
                dense=dense,
                arms=(
                    Arm(label="every block", experiment="moe_6b_every1", x=1),
                    Arm(label="every 2nd block", experiment="moe_6b_every2", x=2),
                    every_4th,
                ),
            ),
            Series(
                name="dispatch",
                dense=dense,
                arms=(Arm(label="exchange", experiment="moe_6b"), gather, of_16, dropless),
            ),
        ),
    )


def moe_vs_dense() -> Study:
    """For a given budget, train dense or a mixture of experts? By wall clock, tokens and FLOPs, at three scales."""

    def rung(size: str) -> Rung:
        dense = Arm(label=f"dense {size}", experiment=f"dense_{size}")
        return Rung(name=size, dense=dense, sparse=(Arm(label=f"MoE {size}, 8 experts", experiment=f"moe_{size}"),))

    def expect(measure: Measure, direction: Direction) -> Expectation:
        return Expectation(measure=measure, direction=direction)

    largest = Rung(name="150k", dense=Arm(label="dense 150k", experiment="dense_150k"))
    ladder = (*(rung(size) for size in ("28k", "50k", "76k")), largest)
    dense = ladder[0].dense
    base = Arm(label="base", experiment="moe_28k")
    ablations = (
        Series(
            name="weight of the balance loss",
            arms=(_moe_28k("0", 0, router__losses__balance=0), replace(base, label="0.01", x=0.01)),
            expected=(expect("dropped", "falls"), expect("busiest", "falls")),
        ),
        Series(
            name="capacity factor",
            dense=dense,
            arms=(*(_moe_28k(f"{c}", c, capacity_factor=c) for c in (1.0, 1.25)), replace(base, label="2.0", x=2)),
            expected=(expect("dropped", "falls"), expect("step_time", "rises")),
        ),
        Series(
            name="blocks per mixture",
            dense=dense,
            arms=(
                Arm(label="1", experiment="moe_28k_every1", x=1),
                replace(base, label="2", x=2),
                Arm(label="4", experiment="moe_28k_every4", x=4),
            ),
            expected=(expect("step_time", "falls"),),
        ),
        Series(
            name="experts",
            dense=dense,
            arms=(
                _moe_28k("4", 4, num_experts=4),
                replace(base, label="8", x=8),
                _moe_28k("16", 16, num_experts=16),
            ),
            expected=(expect("bits_per_byte", "falls"), expect("step_time", "stays")),
        ),
        Series(
            name="weight of the router z-loss",
            arms=(_moe_28k("0", 0, router__losses__z=0), replace(base, label="0.001", x=0.001)),
            expected=(expect("router_logits", "falls"),),
        ),
    )
    return Study(ladder=ladder, ablations=ablations, ablation_steps=200, outlook=_outlook())
