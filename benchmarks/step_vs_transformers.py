"""A train step of axrepro beside one of transformers (eager torch) on the same CPU, same shapes, in one process.

    .venv/bin/python benchmarks/step_vs_transformers.py [--rounds=8] [--dim=128] [--layers=4] [--batch=8] [--length=256]

Both take a forward and backward pass in float32, clip by global norm and update by AdamW. The two alternate, round by
round, so that what else the machine does falls on both. Printed are the ratios of their times per step, ours in the
denominator: above 1 axrepro is faster. Absolute times of a shared CPU mean little and are not printed.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
import transformers

from axrepro.core.config import override
from axrepro.data import Bytes, PythonStdlib, Text
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import llama
from axrepro.nn import MoE, every
from axrepro.optim import AdamW, Constant
from axrepro.train.experiment import Experiment, Train
from axrepro.train.loop import build_program, compile_step

STEPS = 3  # a round
VOCAB, HEADS, EXPERTS = 264, 4, 8


def ours(sizes: argparse.Namespace, sparse: bool) -> Callable[[], None]:
    """Takes one step of a Llama, or of one with experts in every block."""
    model = llama(
        vocab_size=VOCAB, dim=sizes.dim, num_layers=sizes.layers, num_heads=HEADS, hidden=sizes.hidden, tied=True
    )
    data = Text(source=PythonStdlib(), vocabulary=Bytes(), batch_size=sizes.batch, sequence_length=sizes.length)
    experiment = Experiment(
        method=LanguageModel(model=model, chunk=None),
        data=data,
        optimizer=AdamW(learning_rate=Constant(value=1e-3)),
        train=Train(steps=1000, dtype="float32"),
    )
    if sparse:
        experiment = every(experiment, 1, lambda ffn: MoE(expert=ffn, num_experts=EXPERTS))
    program = build_program(override(experiment, {"method.model.layers.unroll": sizes.layers}))
    batch = next(program.experiment.data.batches("train", 0, program.mesh))
    state = [jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)]
    step = compile_step(program, batch)

    def run():
        state[0], report = step(state[0], batch)
        jax.block_until_ready((state[0].params, report["scalars"]))

    return run


def theirs(sizes: argparse.Namespace, sparse: bool) -> Callable[[], None]:
    """Takes one step of transformers' Llama or Mixtral with the same shapes."""
    shape = dict(
        vocab_size=VOCAB,
        hidden_size=sizes.dim,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=True,
    )
    if sparse:
        config = transformers.MixtralConfig(**shape, num_local_experts=EXPERTS, output_router_logits=True)
        model = transformers.MixtralForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, VOCAB, (sizes.batch, sizes.length))

    def run():
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def seconds(step: Callable[[], None]) -> float:
    """Per step, over one round."""
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - started) / STEPS


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in {"rounds": 8, "dim": 128, "hidden": 344, "layers": 4, "batch": 8, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    sizes = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    print(f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, {sizes}")
    print("| model | ratio, median of rounds | lowest | highest |\n|---|---|---|---|")
    for name, sparse in (("dense", False), (f"{EXPERTS} experts, top-2, in every block", True)):
        one, other = ours(sizes, sparse), theirs(sizes, sparse)
        one(), other()  # warm
        ratios = sorted(seconds(other) / seconds(one) for _ in range(sizes.rounds))
        print(f"| {name} | {np.median(ratios):.2f} | {ratios[0]:.2f} | {ratios[-1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
