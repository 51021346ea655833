"""Dispatches of one routing agree: with each other, with transformers, and on meshes with one device."""

import math
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from transformers import DeepseekV3Config, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from axrepro.core import Context, Loss, MeshShape, Rules, collect, make_mesh
from axrepro.core.aux import objective
from axrepro.core.config import override
from axrepro.core.interfaces import Method
from axrepro.core.param import init_params
from axrepro.core.products import Products
from axrepro.core.sharding import named, param_partitions
from axrepro.core.tree import map_tree
from axrepro.errors import UserError
from axrepro.methods.adapter import LoRA
from axrepro.nn import Attention, FeedForward, MoE, RouterLosses, Sequence, TopK
from axrepro.nn.moe import GATHER_REDUCE, ExpertChoice, PerExample
from axrepro.nn.moe import dispatch as dispatching

DIM, EXPERTS, ROWS, LENGTH = 8, 4, 3, 12
FFN = FeedForward(hidden=10)
NO_LOSSES = RouterLosses(balance=0.0, z=0.0)
ROUNDING = 3e-6  # float32 sums of at most some tens of terms in another order, or against float64


def layer(**changes) -> MoE:
    """With room for all, and the grouped product that compiles fastest (all agree: test_grouped_products.py)."""
    plain = MoE(expert=FFN, num_experts=EXPERTS, capacity_factor=float(EXPERTS), implementation="ragged_dot")
    return replace(plain, **changes)


def random_params(moe, seed=0, dim=DIM) -> dict:
    """No parameter is zero, and router logits are spread enough that choices and gates vary."""
    rng = np.random.default_rng(seed)
    shapes = init_params(moe.specs(dim), jax.random.key(0))
    draw = lambda path, leaf: jnp.asarray(rng.normal(0, 1.0 if "router" in path else 0.4, leaf.shape), jnp.float32)
    return map_tree(draw, shapes)


def inputs(seed=1, rows=ROWS, length=LENGTH, dim=DIM):
    return jax.random.normal(jax.random.key(seed), (rows, length, dim))


def padding(rows=ROWS, length=LENGTH):
    """Two documents a row and padding of another length in each; the last row has nothing else."""
    place, left = np.arange(length)[None], length - np.linspace(0, length, rows).astype(int)[:, None]
    return jnp.asarray(np.where(place < 4, 1, 2) * (place < left), jnp.int32)


@cache
def run(moe, mesh=None, rules=Rules(), **options):
    """The compiled (value, (y, aux)), gradients of params and x, of a random combination of outputs and losses."""

    def value(params, x, probe, segments):
        y, aux = moe.apply(params, x, Context(segment_ids=segments, train=True, mesh=mesh, rules=rules, **options))
        return (y * probe).sum() + (objective(aux) if collect(aux, Loss) else 0.0), (y, aux)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


def results(moe, params, x, segments=None, **options) -> dict:
    (_, (y, aux)), (grads, x_grad) = run(moe, **options)(
        params, x, jax.random.normal(jax.random.key(5), x.shape), segments
    )
    return {"y": y, "x": x_grad, "params": grads, "aux": aux}


def same(found, wanted, assert_close, tolerance=1e-5):
    """Values to rounding; gradients, in which the softmax of the router cancels some digits, to `tolerance`."""
    assert_close(found["y"], wanted["y"], ROUNDING)
    assert_close(found["x"], wanted["x"], tolerance)
    assert_close(found["params"], wanted["params"], tolerance)


# ---- one device ----


@pytest.mark.parametrize("k", [1, 2])
def test_dispatches_agree_when_nothing_is_dropped(k, assert_close):
    # not renormalised: the one gate of k=1 would be a constant
    moe = layer(router=TopK(k=k, renormalise=k > 1))
    params, x = random_params(moe), jnp.abs(inputs())
    # an uneven load, and an expert without tokens
    params["router"]["weight"] = params["router"]["weight"].at[:, 2].set(-9.0).at[:, 1].add(0.3)
    wanted = results(replace(moe, dispatch="einsum"), params, x, padding())
    load = wanted["aux"]["load"].counts
    assert load[2] == 0
    assert load.max() > 1.2 * load.mean()
    for dispatch in ("gather", "dropless"):
        found = results(replace(moe, dispatch=dispatch), params, x, padding())
        same(found, wanted, assert_close)
        np.testing.assert_array_equal(found["y"][padding() == 0], 0)
        np.testing.assert_array_equal(found["x"][2], 0)
        for name, grad in found["params"]["experts"].items():
            np.testing.assert_array_equal(grad[2], 0, err_msg=name)
        np.testing.assert_array_equal(found["aux"]["load"].counts, load)
        assert found["aux"]["dropped"].total == 0


def test_einsum_and_gather_agree_where_experts_choose(assert_close):
    moe = layer(router=ExpertChoice(), capacity_factor=0.8)
    params, x = random_params(moe), inputs()
    wanted = results(replace(moe, dispatch="einsum"), params, x, padding())
    same(results(replace(moe, dispatch="gather"), params, x, padding()), wanted, assert_close)


BIASED = FeedForward(hidden=5, act="relu", gated=False, bias=True)


def test_dropless_experts_of_any_kind_equal_a_loop_over_tokens(assert_close):
    expert = Sequence((FFN, BIASED))
    moe = layer(expert=expert, dispatch="dropless", router=TopK(k=2))
    params, x = random_params(moe), inputs()
    found = results(moe, params, x)
    one = jax.jit(
        lambda e, row: expert.apply(jax.tree.map(lambda w: w[e], params["experts"]), row[None], Context())[0][0]
    )
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]["weight"]), 2)
    gates /= gates.sum(-1, keepdims=True)
    expected = np.zeros(x.shape)
    for row, token in np.ndindex(x.shape[:2]):
        for gate, index in zip(gates[row, token], chosen[row, token], strict=True):
            expected[row, token] += gate * one(index, x[row, token])
    assert_close(found["y"], expected, ROUNDING)
    same(found, results(replace(moe, dispatch="gather"), params, x), assert_close)


def test_choices_too_many_for_one_key_are_sorted_another_way_with_the_same_result():
    expert = np.random.default_rng(0).integers(0, 8, (2, 150)).astype(np.int32)
    for largest in (7, 2**31 // 150):  # the key of the last choice would be 2^31
        found = dispatching._by_expert(jnp.asarray(expert), largest)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, np.argsort(expert, axis=-1, kind="stable"))


@pytest.mark.slow
def test_dropless_in_bfloat16_is_as_exact_as_gather():
    moe, x = layer(), inputs()
    params = random_params(moe)
    output = lambda dispatch, dtype: np.asarray(
        jax.jit(lambda p: replace(moe, dispatch=dispatch).apply(p, x, Context(dtype=dtype))[0])(params), np.float32
    )
    exact = output("gather", "float32")
    norm = np.linalg.norm
    errors = {d: norm(output(d, "bfloat16") - exact) / norm(exact) for d in ("gather", "dropless")}
    assert 0 < errors["dropless"] < 1.2 * errors["gather"] < 0.03


# ---- transformers ----


def torch_experts(experts, params):
    """Copies stacked SwiGLU weights into a module of transformers."""
    experts.gate_up_proj.data = torch.cat([params["gate"].mT, params["up"].mT], 1).contiguous()
    experts.down_proj.data = params["down"].mT.contiguous()


def torch_mlp(mlp, params):
    for name in ("gate", "up", "down"):
        getattr(mlp, f"{name}_proj").weight.data = params[name].T.contiguous()


def experts_gradient(experts) -> dict:
    gate, up = (part.mT for part in experts.gate_up_proj.grad.chunk(2, 1))
    return {"gate": gate, "up": up, "down": experts.down_proj.grad.mT}


def mlp_gradient(mlp) -> dict:
    return {name: getattr(mlp, f"{name}_proj").weight.grad.T for name in ("gate", "up", "down")}


def against_torch(moe, block, params, expected_of, assert_close):
    """Forward and gradients of a block of transformers, in float64 but for its router's softmax."""
    x = inputs()
    found = results(moe, params, x)
    theirs = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    y = block(theirs)
    (y * torch.tensor(np.asarray(jax.random.normal(jax.random.key(5), x.shape), np.float64))).sum().backward()
    wanted = {"y": y.detach(), "x": theirs.grad, "params": expected_of(block)}
    same(found, jax.tree.map(lambda a: a.numpy(), wanted), assert_close)


def in_torch(params):
    return jax.tree.map(lambda w: torch.tensor(np.asarray(w, np.float64)), params)


SIZES = {"hidden_size": DIM, "moe_intermediate_size": 10, "num_experts_per_tok": 3, "_experts_implementation": "eager"}


def config_of(kind, **changes):
    """`_experts_implementation` is no argument of the configs."""
    config = kind(**({k: v for k, v in SIZES.items() if k[0] != "_"} | changes))
    config._experts_implementation = "eager"
    return config


@pytest.mark.parametrize(("renormalise", "dispatch"), [(True, "dropless"), (False, "einsum")])
def test_values_and_gradients_equal_qwen3(renormalise, dispatch, assert_close):
    moe = layer(router=TopK(k=3, renormalise=renormalise, losses=NO_LOSSES), dispatch=dispatch)
    params = random_params(moe)
    block = Qwen3MoeSparseMoeBlock(config_of(Qwen3MoeConfig, num_experts=EXPERTS, norm_topk_prob=renormalise)).double()
    weights = in_torch(params)
    block.gate.weight.data = weights["router"]["weight"].T.contiguous()
    torch_experts(block.experts, weights["experts"])
    expected = lambda block: {
        "router": {"weight": block.gate.weight.grad.T},
        "experts": experts_gradient(block.experts),
    }
    against_torch(moe, block, params, expected, assert_close)


def test_a_gated_shared_expert_equals_qwen2(assert_close):
    router = TopK(k=3, renormalise=False, losses=NO_LOSSES)
    moe = layer(router=router, dispatch="dropless", shared=FeedForward(hidden=6), shared_gate=True)
    params = random_params(moe)
    config = config_of(Qwen2MoeConfig, num_experts=EXPERTS, norm_topk_prob=False, shared_expert_intermediate_size=6)
    block, weights = Qwen2MoeSparseMoeBlock(config).double(), in_torch(params)
    block.gate.weight.data = weights["router"]["weight"].T.contiguous()
    block.shared_expert_gate.weight.data = weights["shared_gate"].T.contiguous()
    torch_experts(block.experts, weights["experts"])
    torch_mlp(block.shared_expert, weights["shared"])
    expected = lambda block: {
        "router": {"weight": block.gate.weight.grad.T},
        "experts": experts_gradient(block.experts),
        "shared": mlp_gradient(block.shared_expert),
        "shared_gate": block.shared_expert_gate.weight.grad.T,
    }
    against_torch(moe, block, params, expected, assert_close)


def test_biased_sigmoid_scores_and_a_shared_expert_equal_deepseek(assert_close):
    router = TopK(k=3, scores="sigmoid", scale=2.5, bias_rate=0.1, losses=NO_LOSSES)
    moe = layer(router=router, dispatch="gather", shared=FeedForward(hidden=20))
    params = random_params(moe)
    config = config_of(
        DeepseekV3Config, n_routed_experts=EXPERTS, n_shared_experts=2, n_group=1, topk_group=1, norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    block, weights = DeepseekV3MoE(config).double(), in_torch(params)
    block.gate.weight.data = weights["router"]["weight"].T.contiguous()
    block.gate.e_score_correction_bias.data = weights["router"]["bias"]
    torch_experts(block.experts, weights["experts"])
    torch_mlp(block.shared_experts, weights["shared"])
    expected = lambda block: {
        "router": {"weight": block.gate.weight.grad.T, "bias": torch.zeros(EXPERTS)},
        "experts": experts_gradient(block.experts),
        "shared": mlp_gradient(block.shared_experts),
    }
    against_torch(moe, block, params, expected, assert_close)


# ---- meshes ----

AXES = ("data", "fsdp", "expert", "seq", "model")
WIDE = {"rows": 8, "length": 24, "dim": 16}
MESHED = layer(expert=FeedForward(hidden=12, bias=True), num_experts=8, capacity_factor=8.0)


def mesh_of(*dims):
    return make_mesh(MeshShape(**dict(zip(AXES, dims, strict=False))), jax.devices()[: math.prod(dims)])


def on_mesh(moe, dims, rules=Rules()) -> dict:
    """The results of a layer whose parameters and rows lie as in training."""
    mesh = mesh_of(*dims)
    shardings = named(mesh, param_partitions(moe.specs(16), rules, dict(mesh.shape)))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert"), "seq"))
    params = jax.device_put(random_params(moe, dim=16), shardings)
    put = lambda a: jax.device_put(a, rows)
    found = results(moe, params, put(inputs(**WIDE)), put(padding(8, 24)), mesh=mesh, rules=rules)
    return jax.device_get(found)


@cache
def one_device(moe) -> dict:
    return results(replace(moe, dispatch="gather"), random_params(moe, dim=16), inputs(**WIDE), padding(8, 24))


@pytest.mark.parametrize(
    "dims",
    [(1, 1, 2, 2, 2)]
    + [pytest.param(dims, marks=pytest.mark.slow) for dims in ((1, 1, 8), (1, 8, 1), (8, 1, 1), (2, 2, 2))],
    ids=str,
)
def test_dropless_experts_on_a_mesh_are_those_of_one_device(dims, assert_close):
    found = on_mesh(replace(MESHED, dispatch="dropless"), dims)
    same(found, one_device(MESHED), assert_close, 2e-5)
    assert found["aux"]["dropped"].total == 0
    np.testing.assert_array_equal(found["aux"]["load"].counts, one_device(MESHED)["aux"]["load"].counts)


def test_gathered_tokens_and_summed_outputs_are_another_table_of_rules(assert_close):
    found = on_mesh(replace(MESHED, dispatch="gather"), (1, 2, 4), Rules().replace(**GATHER_REDUCE))
    same(found, one_device(MESHED), assert_close, 2e-5)


def test_whole_examples_travel_between_devices(assert_close):
    moe = layer(router=PerExample(router=TopK(k=2)))
    same(on_mesh(replace(moe, dispatch="dropless"), (1, 1, 4, 2)), one_device(moe), assert_close, 2e-5)


# ---- a bound on what a device receives ----


def expected_survivors(index, chosen, devices, room, experts):
    """Which choices [sender, token, rank] find room, as loops over senders and receivers."""
    each = experts // devices
    wanted = np.zeros((devices, devices), int)
    for sender in range(devices):
        for receiver in range(devices):
            wanted[sender, receiver] = (chosen[sender] & (index[sender] // each == receiver)).sum()
    survivors = np.zeros(chosen.shape, bool)
    for sender in range(devices):
        for receiver in range(devices):
            arriving = wanted[:, receiver].sum()
            allowed = wanted[sender, receiver] if arriving <= room else int(wanted[sender, receiver] * room / arriving)
            # in the order of experts, then ranks, then tokens
            mine = [
                (index[sender][token, rank], rank, token)
                for rank in range(chosen.shape[2])
                for token in range(chosen.shape[1])
                if chosen[sender][token, rank] and index[sender][token, rank] // each == receiver
            ]
            for _, rank, token in sorted(mine)[:allowed]:
                survivors[sender, token, rank] = True
    return survivors


def test_a_bounded_buffer_loses_what_it_counts_and_nothing_else(assert_close):
    factor = 0.4
    moe = replace(MESHED, dispatch="dropless", buffer_factor=factor, router=TopK(k=2, losses=NO_LOSSES))
    found = on_mesh(moe, (1, 1, 4))  # two experts and two rows a device
    params, x = random_params(moe, dim=16), inputs(**WIDE)
    known = np.asarray(padding(8, 24)) > 0
    index = jax.lax.top_k(x @ params["router"]["weight"], 2)[1]
    chosen = np.broadcast_to(known[..., None], index.shape)
    per_device = lambda a: np.asarray(a).reshape(4, 48, 2)
    survivors = expected_survivors(per_device(index), per_device(chosen), 4, int(48 * 2 * factor), 8).reshape(
        chosen.shape
    )
    lost = int(chosen.sum() - survivors.sum())
    assert lost > 10
    assert (found["aux"]["dropped"].total, found["aux"]["dropped"].count) == (lost, chosen.sum())

    def masked(params, x):
        """Every expert on every token, and the gates of the survivors alone."""
        gates, _ = jax.lax.top_k(jax.nn.softmax(x @ params["router"]["weight"]), 2)
        gates = gates / gates.sum(-1, keepdims=True) * survivors
        weights = (jax.nn.one_hot(index, 8) * gates[..., None]).sum(-2)
        each = jax.vmap(lambda e: moe.expert.apply(e, x, Context())[0])(params["experts"])
        return jnp.einsum("bte,ebtd->btd", weights, each)

    probe = jax.random.normal(jax.random.key(5), x.shape)
    y, back = jax.jit(lambda params, x: jax.vjp(masked, params, x))(params, x)
    grads, x_grad = jax.jit(back)(probe)
    same(found, {"y": y, "params": grads, "x": x_grad}, assert_close, 2e-5)
    nothing = ~survivors.any(-1)
    np.testing.assert_array_equal(found["y"][nothing], 0)
    np.testing.assert_array_equal(found["x"][nothing], 0)


# ---- adapters ----


class Regression(Method):
    """The layer's output against a probe; just enough of a method for an adapter."""

    def __init__(self, moe):
        self.moe = moe

    def specs(self):
        return self.moe.specs(16)

    def loss(self, params, batch, ctx):
        y, _ = self.moe.apply(params, batch["x"], ctx)
        return {"loss": Loss.mean(y * batch["probe"])}


@pytest.mark.slow
def test_adapters_of_dropless_experts_on_a_mesh_are_those_of_gathered_ones(assert_close):
    batch = {"x": inputs(**WIDE), "probe": inputs(5, **WIDE)}

    def gradients(dispatch, mesh):
        method = LoRA(method=Regression(replace(MESHED, dispatch=dispatch)), rank=3)
        ctx = Context(train=True, mesh=mesh)
        params = random_params(type("Specs", (), {"specs": lambda _, dim: method.specs()})())
        return jax.jit(jax.value_and_grad(lambda p: objective(method.loss(p, batch, ctx))))(params)

    value, grads = gradients("dropless", mesh_of(1, 2, 2, 1, 2))
    expected, expected_grads = gradients("gather", None)
    assert {name for name in grads["experts"]} >= {"up_lora_a", "up_lora_b", "down_lora_a"}
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert_close(grads, expected_grads, 2e-5)


@pytest.mark.parametrize("dispatch", ["einsum", "gather", "dropless"])
def test_what_experts_get_and_give_has_names_for_rematerialisation(dispatch):
    moe = layer(dispatch=dispatch)
    jaxpr = jax.make_jaxpr(lambda p: moe.apply(p, inputs(), Context())[0])(random_params(moe))
    assert {"moe_routing", "moe_in", "moe_out"} <= set(re.findall(r"name\[name=(\w+)", str(jaxpr)))


# ---- wrong inputs ----


def test_wrong_layers_are_refused_in_one_line():
    wrong = [
        (lambda: override(layer(), {"dispatch": "sorted"}), "dispatch.*dropless"),
        (lambda: override(layer(), {"router.scores": "sofmax"}), "scores.*sigmoid"),
        (lambda: override(layer(), {"implementation": "megabloks"}), "implementation.*megablox"),
        (
            lambda: layer(dispatch="dropless", expert=Attention(num_heads=2)),
            r"where the expert mixes tokens \(Attention\)",
        ),
        (lambda: layer(buffer_factor=0.0), r"MoE\.buffer_factor=0\.0: it takes a number above 0"),
        (lambda: layer(capacity_factor=-1.0), r"MoE\.capacity_factor=-1\.0"),
        (lambda: layer(num_experts=0), r"MoE\.num_experts=0"),
        (lambda: layer(shared_gate=True), r"MoE\.shared_gate=True: it takes False without a shared layer"),
        (lambda: layer(router=TopK(k=5)).specs(DIM), "k=5 needs at least as many experts"),
        (lambda: run_once(layer(group_size=5)), "group_size=5 must divide the row length 12"),
        (
            lambda: run_once(layer(dispatch="dropless"), products=Products(format="int8")),
            "no int8 products; set dispatch",
        ),
    ]
    for make, message in wrong:
        with pytest.raises(UserError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


def run_once(moe, **options):
    jax.eval_shape(lambda p: moe.apply(p, inputs(), Context(**options)), random_params(moe))
