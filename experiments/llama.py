"""Llama 2 (arXiv:2307.09288) and Llama 3.1 (arXiv:2407.21783): dense decoders with grouped queries.

Run: python -m axrepro.launch --experiment=llama3_8b --workdir=gs://BUCKET/llama3_8b
Hardware: 16 bytes per parameter are 0.1 TiB at 7B and 6 TiB at 405B, and each block of each row keeps its input: 4 rows
a chip of llama3_405b are 126 GiB, so v5p-1024 takes --train.grad_accumulation=4. The authors trained 405B on up to
16,384 H100. Nothing above `tiny` has been trained here.
Shapes: Llama 2, Sec. 2.2 and Table 1; Llama 3, Table 3; widths of the feed-forward layers, eps, vocabulary sizes and
the scaling of RoPE from the config.json of the released weights (meta-llama/Llama-2-7b-hf, Llama-2-70b-hf,
Llama-3.1-8B, -70B, -405B). Learning rates, schedules and tokens: Llama 2, Sec. 2.2; Llama 3, Table 3 and Sec. 3.4.1.
Not public: the text, its mixture and order; Llama 3's Adam moments and clipping (here those of Llama 2), and warm-up,
floor and tokens of its two smaller sizes (here those of 405B).
Departures from Llama 3: the batch has its last size, 16M tokens, from the start, where the paper begins with 4M; rows
stay at the 8,192 tokens before the long-context stages, but RoPE is scaled as released, for 131,072. Both: the
vocabulary is a SentencePiece model of one's own with at most the model's number of ids.
"""

from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM, llama
from axrepro.nn import Llama3Scaling, RoPE
from axrepro.optim import AdamW, Cosine
from axrepro.train.experiment import Experiment
from experiments._pretraining import mesh_rules, pretraining, small

_LLAMA3_ROPE = RoPE(
    base=500_000.0,
    scaling=Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=8192),
)


def _llama2(peak: float, remat: str = "qkvo", **shape) -> Experiment:
    model = llama(vocab_size=32_000, head_dim=128, rope=RoPE(base=10_000.0), eps=1e-5, **shape)
    return pretraining(
        LanguageModel(model=model),
        tokens=2e12,
        batch_size=1024,
        sequence_length=4096,
        optimizer=AdamW(learning_rate=Cosine(peak=peak, warmup=2000, floor=0.1), eps=1e-5, weight_decay=0.1, clip=1.0),
        rules=mesh_rules(remat=remat),
    )


def _llama3(peak: float, remat: str = "qkvo", **shape) -> Experiment:
    return pretraining(
        LanguageModel(model=_llama3_model(vocab_size=128_256, head_dim=128, rope=_LLAMA3_ROPE, **shape)),
        tokens=15.6e12,
        batch_size=2048,
        sequence_length=8192,
        optimizer=AdamW(learning_rate=Cosine(peak=peak, warmup=8000, floor=0.01), eps=1e-5, weight_decay=0.1, clip=1.0),
        rules=mesh_rules(remat=remat),
    )


def _llama3_model(**shape) -> CausalLM:
    return llama(eps=1e-5, **shape)


def llama2_7b() -> Experiment:
    """Llama 2 7B: multi-head attention, 4,096 tokens a row."""
    return _llama2(3e-4, dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, hidden=11008)


def llama2_70b() -> Experiment:
    """Llama 2 70B: 8 key-value heads."""
    return _llama2(1.5e-4, "full", dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, hidden=28672)


def llama3_8b() -> Experiment:
    """Llama 3.1 8B."""
    return _llama3(3e-4, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, hidden=14336)


def llama3_70b() -> Experiment:
    """Llama 3.1 70B."""
    return _llama3(1.5e-4, "full", dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, hidden=28672)


def llama3_405b() -> Experiment:
    """Llama 3.1 405B."""
    return _llama3(8e-5, "full", dim=16384, num_layers=126, num_heads=128, num_kv_heads=8, hidden=53248)


def tiny() -> Experiment:
    """Llama 3 in small, with RoPE scaled from half of its context, for tests."""
    rope = RoPE(base=500_000.0, scaling=Llama3Scaling(factor=8.0, original_length=32))
    shape = {"dim": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden": 128}
    return small(_llama3_model(vocab_size=264, rope=rope, **shape))
