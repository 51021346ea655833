"""A train step of transformers' Llama or Mixtral in eager torch."""

import os
from collections.abc import Callable

import torch
import transformers

from benchmarks.sizes import Sizes


def make_step(sizes: Sizes) -> Callable[[], float]:
    """A function that takes one step and returns the loss."""
    torch.set_num_threads(os.cpu_count())
    shape = dict(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        tie_word_embeddings=True,
    )
    if sizes.num_experts:
        config = transformers.MixtralConfig(**shape, num_local_experts=sizes.num_experts, output_router_logits=True)
        model = transformers.MixtralForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, sizes.vocab_size, (sizes.batch, sizes.length))

    def take():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return take
