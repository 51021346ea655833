"""The experiments with public shapes are the released models: their figures, sizes, and (in small) values."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from axrepro import registry
from axrepro.core import Context
from axrepro.core.aux import losses_by_name
from axrepro.core.config import swap, walk
from axrepro.core.param import count_params
from axrepro.nn import MoE
from tests.models.transformers_models import assert_parity, converted, ours, random_model

MODELS = {
    LlamaConfig: LlamaForCausalLM,
    MixtralConfig: MixtralForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
    Qwen3MoeConfig: Qwen3MoeForCausalLM,
}
NAMES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "intermediate_size")  # fmt: skip


def shape(*values: int) -> dict[str, int]:
    return dict(zip(NAMES, values, strict=True))


def rope(base: float, original_length: int | None = None) -> dict:
    if original_length is None:
        return {"rope_type": "default", "rope_theta": base}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_type": "llama3", "rope_theta": base, "original_max_position_embeddings": original_length, **scaling}


LLAMA2 = {"rms_norm_eps": 1e-5, "rope_parameters": rope(1e4), "tie_word_embeddings": False}
LLAMA3 = {"rms_norm_eps": 1e-5, "rope_parameters": rope(5e5, 8192), "tie_word_embeddings": False}
MIXTRAL = {"rms_norm_eps": 1e-5, "rope_parameters": rope(1e6), "tie_word_embeddings": False, "num_local_experts": 8,
           "num_experts_per_tok": 2, "sliding_window": None}  # fmt: skip
QWEN3 = {"rms_norm_eps": 1e-6, "rope_parameters": rope(1e6), "tie_word_embeddings": False}
QWEN3_MOE = {**QWEN3, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
             "mlp_only_layers": [], "router_aux_loss_coef": 0.001}  # fmt: skip
PUBLIC = {  # as in the released config.json
    "llama2_7b": LlamaConfig(**LLAMA2, **shape(32000, 4096, 32, 32, 32, 128, 11008)),
    "llama2_70b": LlamaConfig(**LLAMA2, **shape(32000, 8192, 80, 64, 8, 128, 28672)),
    "llama3_8b": LlamaConfig(**LLAMA3, **shape(128256, 4096, 32, 32, 8, 128, 14336)),
    "llama3_70b": LlamaConfig(**LLAMA3, **shape(128256, 8192, 80, 64, 8, 128, 28672)),
    "llama3_405b": LlamaConfig(**LLAMA3, **shape(128256, 16384, 126, 128, 8, 128, 53248)),
    "mixtral_8x7b": MixtralConfig(
        **MIXTRAL, **shape(32000, 4096, 32, 32, 8, 128, 14336), router_aux_loss_coef=0.02, max_position_embeddings=32768
    ),
    "mixtral_8x22b": MixtralConfig(
        **MIXTRAL,
        **shape(32000, 6144, 56, 48, 8, 128, 16384),
        router_aux_loss_coef=0.001,
        max_position_embeddings=65536,
    ),
    "qwen3_0p6b": Qwen3Config(**QWEN3 | {"tie_word_embeddings": True}, **shape(151936, 1024, 28, 16, 8, 128, 3072)),
    "qwen3_8b": Qwen3Config(**QWEN3, **shape(151936, 4096, 36, 32, 8, 128, 12288)),
    "qwen3_30b_a3b": Qwen3MoeConfig(
        **QWEN3_MOE, **shape(151936, 2048, 48, 32, 4, 128, 6144), moe_intermediate_size=768
    ),
    "qwen3_235b_a22b": Qwen3MoeConfig(
        **QWEN3_MOE, **shape(151936, 4096, 94, 64, 4, 128, 12288), moe_intermediate_size=1536
    ),
}
TINY = {
    "llama": LlamaConfig(**LLAMA3 | {"rope_parameters": rope(5e5, 32)}, **shape(264, 48, 2, 4, 2, 16, 128)),
    "mixtral": MixtralConfig(**MIXTRAL, **shape(264, 48, 2, 4, 2, 16, 64), router_aux_loss_coef=0.02),
    "qwen3": Qwen3MoeConfig(
        **QWEN3_MOE | {"tie_word_embeddings": True, "num_experts": 8, "num_experts_per_tok": 4},
        **shape(264, 48, 2, 4, 2, 16, 0),
        moe_intermediate_size=32,
    ),
}
TOTAL_AND_ACTIVE = {  # billions, as the papers and model cards say
    "mixtral_8x7b": (46.7, 12.9),
    "mixtral_8x22b": (140.6, 39.1),
    "qwen3_30b_a3b": (30.5, 3.3),
    "qwen3_235b_a22b": (235, 22),
}
ENTRIES = registry.index()


def model_of(name: str):
    return registry.load(registry.find(name, ENTRIES)).method.model


def without_drops(model):
    """The model with experts that have room for every token, as the torch models have."""
    if not any(isinstance(part, MoE) for _, part in walk(model)):
        return model
    return swap(model, MoE, lambda moe: replace(moe, capacity_factor=moe.num_experts, group_size=None))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_figure_is_that_of_the_released_config(name):
    # widths, heads, rope and its scaling, eps, norms of queries and keys, tying, experts, k, balance weight
    assert without_drops(model_of(name)) == ours(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_the_parameters_are_as_many_as_in_transformers(name):
    config = PUBLIC[name]
    with torch.device("meta"):
        reference = MODELS[type(config)](config)
    assert count_params(model_of(name).specs()) == sum(weight.numel() for weight in reference.parameters())


def test_every_size_is_compared():
    names = {e.function for e in ENTRIES if e.file in TINY and e.function != "tiny"}
    assert names == set(PUBLIC)


@pytest.mark.parametrize("name", TOTAL_AND_ACTIVE)
def test_a_token_uses_the_dense_part_and_k_experts_a_layer(name):
    config, specs = PUBLIC[name], model_of(name).specs()
    hidden = getattr(config, "moe_intermediate_size", config.intermediate_size)
    expert = 3 * config.hidden_size * hidden
    unused = config.num_hidden_layers * (config.num_local_experts - config.num_experts_per_tok) * expert
    total, active = count_params(specs), count_params(specs, active=True)
    assert active == total - unused
    published_total, published_active = TOTAL_AND_ACTIVE[name]
    assert total / 1e9 == pytest.approx(published_total, abs=0.5 if published_total == 235 else 0.1)
    assert active / 1e9 == pytest.approx(published_active, abs=0.5 if published_total == 235 else 0.1)


@pytest.mark.parametrize("name", TINY)
def test_logits_and_all_gradients_of_the_tiny_equal_transformers(name, assert_close):
    config = TINY[name]
    assert without_drops(model_of(f"{name}:tiny")) == ours(config)
    assert_parity(MODELS[type(config)], config, assert_close)


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_the_weighted_balance_loss_of_one_layer_equals_transformers(name, assert_close):
    # of one layer and one row: for several the released code pools what we average
    config = type(TINY[name])(**TINY[name].to_dict() | {"num_hidden_layers": 1})
    torch.manual_seed(0)
    reference = random_model(MODELS[type(config)], config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 40))
    logits = reference(input_ids=torch.tensor(tokens), output_router_logits=True).router_logits
    balance = load_balancing_loss_func(logits, config.num_local_experts, config.num_experts_per_tok)
    params = converted(config, dict(reference.named_parameters()))
    _, aux = jax.jit(ours(config).apply)(params, jnp.asarray(tokens), Context())
    terms = losses_by_name(aux)
    assert_close(terms["balance"].total / terms["balance"].count, config.router_aux_loss_coef * balance.item(), 1e-5)
