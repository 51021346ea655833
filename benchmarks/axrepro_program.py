"""A train step of axrepro as its loop runs it."""

from collections.abc import Callable

import jax

from axrepro.core.config import override
from axrepro.data import Bytes, PythonStdlib, Text
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import llama
from axrepro.nn import MoE, every
from axrepro.optim import AdamW, Constant
from axrepro.train.experiment import Experiment, Train
from axrepro.train.loop import build_program, compile_step
from benchmarks.sizes import Sizes


def experiment(sizes: Sizes) -> Experiment:
    """The run, of which the benchmark takes the step."""
    model = llama(
        vocab_size=sizes.vocab_size,
        dim=sizes.dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        hidden=sizes.hidden,
        tied=True,
    )
    result = Experiment(
        method=LanguageModel(model=model, chunk=None),
        data=Text(source=PythonStdlib(), vocabulary=Bytes(), batch_size=sizes.batch, sequence_length=sizes.length),
        optimizer=AdamW(learning_rate=Constant(value=1e-3)),
        train=Train(steps=100_000, dtype="float32"),
    )
    if sizes.num_experts:
        result = every(result, 1, lambda ffn: MoE(expert=ffn, num_experts=sizes.num_experts))
    return override(result, {"method.model.layers.unroll": sizes.num_layers})


def make_step(sizes: Sizes) -> Callable[[], float]:
    """A function that takes one step, waits for it, and returns the loss."""
    program = build_program(experiment(sizes))
    batch = next(program.experiment.data.batches("train", 0, program.mesh))
    state = jax.jit(program.init, static_argnums=0, out_shardings=program.shardings)(0)
    step = compile_step(program, batch)

    def take():
        nonlocal state
        state, report = step(state, batch)
        jax.block_until_ready(state.params)
        return float(report["scalars"]["loss"])

    return take
