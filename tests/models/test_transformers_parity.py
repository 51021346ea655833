"""The Llama family equals `transformers`, value and gradients, with the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from axrepro.core import Context
from axrepro.core.aux import losses_by_name
from axrepro.core.param import abstract_params
from axrepro.core.tree import flatten, unflatten
from axrepro.losses.cross_entropy import softmax_cross_entropy
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import llama
from axrepro.nn import LinearScaling, Llama3Scaling, RMSNorm, RoPE, YarnScaling

TOLERANCE = 1e-5  # float32 has 6e-8 a product; sums over some thousands of terms in another order lose two digits


@dataclasses.dataclass(frozen=True)
class Case:
    """One tiny model in both libraries."""

    dim: int = 32
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    hidden: int = 48
    base: float = 10_000.0
    rope: dict | None = None
    tied: bool = False
    qk_norm: bool = False
    eps: float = 1e-6
    vocab_size: int = 61
    batch: int = 2
    length: int = 40

    def reference(self):
        """The torch model, every weight random, norms included."""
        config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if self.qk_norm else (LlamaConfig, LlamaForCausalLM)
        config = config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.dim,
            intermediate_size=self.hidden,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.eps,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.base} | (self.rope or {}),
            max_position_embeddings=64,
            attn_implementation="eager",
        )
        model = model_class(config).double()
        for name, weight in model.named_parameters():
            norm = "norm" in name
            torch.nn.init.normal_(weight, mean=1.0 if norm else 0.0, std=0.2 if norm else weight.shape[-1] ** -0.5)
        return model

    def ours(self):
        """The same model here."""
        scaling = None
        if self.rope is not None:
            scaling = {
                "linear": lambda r: LinearScaling(factor=r["factor"]),
                "llama3": lambda r: Llama3Scaling(
                    factor=r["factor"],
                    low_frequency_factor=r["low_freq_factor"],
                    high_frequency_factor=r["high_freq_factor"],
                    original_length=r["original_max_position_embeddings"],
                ),
                "yarn": lambda r: YarnScaling(
                    factor=r["factor"], original_length=r["original_max_position_embeddings"], beta_fast=4.0
                ),
            }[self.rope["rope_type"]](self.rope)
        return llama(
            vocab_size=self.vocab_size,
            dim=self.dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden=self.hidden,
            rope=RoPE(base=self.base, scaling=scaling),
            qk_norm=RMSNorm(eps=self.eps) if self.qk_norm else None,
            eps=self.eps,
            tied=self.tied,
        )

    def converted(self, named: dict[str, torch.Tensor]) -> dict:
        """Weights, or gradients, by their torch names as a tree like ours."""
        heads = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}

        def layer(i):
            weight = lambda name: named[f"model.layers.{i}.{name}.weight"].detach().numpy()
            out = {
                "attention_norm/scale": weight("input_layernorm"),
                "ffn_norm/scale": weight("post_attention_layernorm"),
                "attention/out": weight("self_attn.o_proj").T.reshape(self.num_heads, self.head_dim, self.dim),
                "ffn/gate": weight("mlp.gate_proj").T,
                "ffn/up": weight("mlp.up_proj").T,
                "ffn/down": weight("mlp.down_proj").T,
            }
            for name, count in heads.items():
                product = weight(f"self_attn.{name}_proj").T
                out[f"attention/{name}"] = product.reshape(self.dim, count, self.head_dim)
            if self.qk_norm:
                out["attention/q_norm/scale"] = weight("self_attn.q_norm")
                out["attention/k_norm/scale"] = weight("self_attn.k_norm")
            return out

        layers = [layer(i) for i in range(self.num_layers)]
        flat = {f"layers/{path}": np.stack([one[path] for one in layers]) for path in layers[0]}
        flat["embed/table"] = named["model.embed_tokens.weight"].detach().numpy()
        flat["norm/scale"] = named["model.norm.weight"].detach().numpy()
        if not self.tied:
            flat["head"] = named["lm_head.weight"].detach().numpy().T
        return unflatten(flat)


def as_float32(tree: dict) -> dict:
    return jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), tree)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
CASES = {
    "grouped_tied": Case(tied=True, eps=1e-5),
    "multi_query_wide_heads": Case(num_kv_heads=1, head_dim=16, dim=24, num_layers=3, base=500_000.0),
    "multi_head_linear": Case(num_kv_heads=4, rope={"rope_type": "linear", "factor": 4.0}),
    "llama3_tied": Case(rope=LLAMA3, head_dim=16, tied=True),
    "yarn": Case(rope=YARN, head_dim=16),
    "qwen3": Case(qk_norm=True, head_dim=16, base=1_000_000.0),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_all_gradients_equal_transformers(name, assert_close):
    # the reference runs in float64, so that the tolerance measures our float32 rounding alone
    case = CASES[name]
    model = case.ours()

    @jax.jit
    def run(params, tokens, targets):
        def value(params):
            hidden, _ = model.apply(params, tokens, Context())
            logits = model.logits(params, hidden, Context())
            return softmax_cross_entropy(logits, targets)[0].mean(), logits

        return jax.value_and_grad(value, has_aux=True)(params)

    for seed in range(3):
        torch.manual_seed(seed)
        reference = case.reference()
        tokens, targets = np.random.default_rng(seed).integers(0, case.vocab_size, (2, case.batch, case.length))
        logits = reference(input_ids=torch.tensor(tokens)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
        loss.backward()

        params = as_float32(case.converted(dict(reference.named_parameters())))
        shapes = {path: spec.shape for path, spec in flatten(abstract_params(model.specs())).items()}
        assert {path: leaf.shape for path, leaf in flatten(params).items()} == shapes
        (our_loss, our_logits), our_gradients = run(params, jnp.asarray(tokens), jnp.asarray(targets))
        assert_close(our_logits, logits.detach().numpy(), TOLERANCE)
        assert_close(our_loss, loss.item(), TOLERANCE)
        gradients = case.converted({key: weight.grad for key, weight in reference.named_parameters()})
        assert_close(our_gradients, gradients, TOLERANCE)


def test_the_comparison_notices_another_rope_base():
    # guards the test above: the positions must matter at these sizes
    case = Case()
    torch.manual_seed(0)
    reference = case.reference()
    tokens = np.arange(40)[None] % case.vocab_size
    params = as_float32(case.converted(dict(reference.named_parameters())))
    model = dataclasses.replace(case, base=20_000.0).ours()
    hidden, _ = model.apply(params, jnp.asarray(tokens), Context())
    expected = reference(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    difference = np.linalg.norm(np.asarray(model.logits(params, hidden, Context())) - expected)
    assert difference > 1e3 * TOLERANCE * np.linalg.norm(expected)


def test_the_method_scores_as_torch_does_over_the_masked_tokens(assert_close):
    # weighted nll, accuracy and the z-loss, with padding and a loss mask, from the float64 logits
    case = Case(tied=True)
    torch.manual_seed(3)
    reference = case.reference()
    params = as_float32(case.converted(dict(reference.named_parameters())))
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, case.vocab_size, (2, case.batch, case.length))
    weights = rng.choice([0.0, 0.5, 1.0], tokens.shape)
    segments = np.ones(tokens.shape, np.int32)
    segments[0, -10:] = 0
    batch = {"tokens": tokens, "targets": targets, "segment_ids": segments, "loss_mask": np.float32(weights)}

    logits = reference(input_ids=torch.tensor(tokens)).logits.detach()
    targets[1] = logits[1].argmax(-1)  # so that some predictions are right
    weights = torch.tensor(weights * (segments > 0))
    mean = lambda values: (values * weights).sum().item() / weights.sum().item()
    nll = torch.nn.functional.cross_entropy(logits.mT, torch.tensor(targets), reduction="none")

    method = LanguageModel(model=case.ours(), chunk=8, z_weight=0.25)
    batch = jax.tree.map(jnp.asarray, batch)
    aux = jax.jit(method.loss)(params, batch, Context())
    terms = losses_by_name(aux)
    assert_close(terms["lm"].total / terms["lm"].count, mean(nll), TOLERANCE)
    assert_close(terms["lm_z"].total / terms["lm_z"].count, 0.25 * mean(logits.logsumexp(-1) ** 2), TOLERANCE)
    assert_close(aux["accuracy"].total, ((logits.argmax(-1) == torch.tensor(targets)) * weights).sum().item(), 1e-6)
    evaluated = jax.jit(method.evaluate)(params, batch, Context())
    assert_close(evaluated["bits_per_token"].total / evaluated["lm"].count, mean(nll) / np.log(2), TOLERANCE)
    assert set(losses_by_name(evaluated)) == {"lm"}
