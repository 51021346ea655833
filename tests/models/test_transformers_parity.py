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
from axrepro.methods.language_model import LanguageModel
from tests.models.transformers_models import TOLERANCE, assert_parity, converted, ours, random_model


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

    @property
    def config(self):
        """The config of the torch model."""
        return (Qwen3Config if self.qk_norm else LlamaConfig)(
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
        )

    @property
    def model_class(self):
        """Its class."""
        return Qwen3ForCausalLM if self.qk_norm else LlamaForCausalLM


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
    case = CASES[name]
    assert_parity(case.model_class, case.config, assert_close, seeds=range(3))


def test_the_comparison_notices_another_rope_base():
    # guards the test above: the positions must matter at these sizes
    case = Case()
    torch.manual_seed(0)
    reference = random_model(case.model_class, case.config)
    tokens = np.arange(40)[None] % case.vocab_size
    params = converted(case.config, dict(reference.named_parameters()))
    model = ours(dataclasses.replace(case, base=20_000.0).config)
    hidden, _ = model.apply(params, jnp.asarray(tokens), Context())
    expected = reference(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    difference = np.linalg.norm(np.asarray(model.logits(params, hidden, Context())) - expected)
    assert difference > 1e3 * TOLERANCE * np.linalg.norm(expected)


def test_the_method_scores_as_torch_does_over_the_masked_tokens(assert_close):
    # weighted nll, accuracy and the z-loss, with padding and a loss mask, from the float64 logits
    case = Case(tied=True)
    torch.manual_seed(3)
    reference = random_model(case.model_class, case.config)
    params = converted(case.config, dict(reference.named_parameters()))
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, case.vocab_size, (2, 2, 40))
    weights = rng.choice([0.0, 0.5, 1.0], tokens.shape)
    segments = np.ones(tokens.shape, np.int32)
    segments[0, -10:] = 0
    batch = {"tokens": tokens, "targets": targets, "segment_ids": segments, "loss_mask": np.float32(weights)}

    logits = reference(input_ids=torch.tensor(tokens)).logits.detach()
    targets[1] = logits[1].argmax(-1)  # so that some predictions are right
    weights = torch.tensor(weights * (segments > 0))
    mean = lambda values: (values * weights).sum().item() / weights.sum().item()
    nll = torch.nn.functional.cross_entropy(logits.mT, torch.tensor(targets), reduction="none")

    method = LanguageModel(model=ours(case.config), chunk=8, z_weight=0.25)
    batch = jax.tree.map(jnp.asarray, batch)
    aux = jax.jit(method.loss)(params, batch, Context())
    terms = losses_by_name(aux)
    assert_close(terms["lm"].total / terms["lm"].count, mean(nll), TOLERANCE)
    assert_close(terms["lm_z"].total / terms["lm_z"].count, 0.25 * mean(logits.logsumexp(-1) ** 2), TOLERANCE)
    assert_close(aux["accuracy"].total, ((logits.argmax(-1) == torch.tensor(targets)) * weights).sum().item(), 1e-6)
    evaluated = jax.jit(method.evaluate)(params, batch, Context())
    assert_close(evaluated["bits_per_token"].total / evaluated["lm"].count, mean(nll) / np.log(2), TOLERANCE)
    assert set(losses_by_name(evaluated)) == {"lm"}
