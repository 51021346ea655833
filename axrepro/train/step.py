"""The train step: pure, (state, batch) -> (state, metrics)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from axrepro.core.aux import (
    Histogram,
    Metric,
    Update,
    apply_updates,
    collect,
    losses_by_name,
    objective,
    ratio,
    summed,
)
from axrepro.core.context import Context
from axrepro.core.tree import fill, flatten, select
from axrepro.train.state import Program, TrainState


@dataclass(frozen=True)
class Pass:
    """What one phase of a step computed.

    Attributes:
      prefix: of names, "" where there is only one phase.   ctx: given to `loss`.   loss: of trained params, batch, ctx.
      active: trained params before the phase.   grads, delta: their gradients and changes.   aux: of the whole batch.
      rates: learning rates of the update.   params, opt_state: all of them after the phase.
    """

    prefix: str
    ctx: Context
    loss: Callable[[dict, dict, Context], dict]
    active: dict
    grads: dict
    delta: Any
    aux: dict
    rates: dict
    params: dict
    opt_state: dict


def passes(program: Program, state: TrainState[jax.Array], batch: dict) -> Iterator[Pass]:
    """The phases of a step in order, each from the parameters that the one before left."""
    method, settings = program.experiment.method, program.experiment.train
    key = jax.random.fold_in(state.key, state.step)
    params, opt_state = state.params, dict(state.opt_state)
    for index, phase in enumerate(program.phases):
        trained = set(flatten(program.trained(phase)))
        active = select(params, trained.__contains__)
        rest = jax.lax.stop_gradient(select(params, lambda path, trained=trained: path not in trained))
        ctx = program.context(jax.random.fold_in(key, index), train=True, phase=phase.name)

        def loss(active, batch, ctx, rest=rest):
            return method.loss(fill(program.specs, active, rest), batch, ctx)

        grads, aux = method.gradients(loss, active, batch, ctx, settings.grad_accumulation)
        rates = program.learning_rates(opt_state, phase)
        with jax.named_scope("optimizer"):
            delta, opt_state[phase.name] = program.optimizers[phase.name].update(grads, opt_state[phase.name], active)
            # pyrefly: ignore[bad-argument-type]  # optax returns the structure it is given, but types any pytree
            params = fill(program.specs, optax.apply_updates(active, delta), rest)
            params = apply_updates(params, collect(aux, Update), program.specs)
        prefix = "" if len(program.phases) == 1 else f"{phase.name}/"
        yield Pass(prefix, ctx, loss, active, grads, delta, aux, rates, params, dict(opt_state))


def train_step(program: Program, state: TrainState[jax.Array], batch: dict) -> tuple[TrainState[jax.Array], dict]:
    """One step: every phase of the method in order, each with its own gradients and optimizer.

    A step with a loss, gradient or update that is not finite changes nothing but `step` and `skips`.

    Returns:
      The next state, and {"scalars": name -> float32, "by_layer": name -> float32[layers] where layers are stacked,
      "histograms": name -> Histogram, "ok": bool, "finite": name of a checked tensor -> bool, "skips": those of the
      next state}.
    """
    scalars, by_layer, histograms, finite = {}, {}, {}, {}
    for done in passes(program, state, batch):
        scalars |= {f"{done.prefix}{k}": v for k, v in (report(done.aux) | done.rates).items()}
        by_layer |= {f"{done.prefix}{k}": v for k, v in report_by_layer(done.aux).items()}
        histograms |= {f"{done.prefix}{k}": v for k, v in collect(done.aux, Histogram).items()}
        norms = {path: jnp.sum(jnp.square(g.astype(jnp.float32))) for path, g in flatten(done.grads).items()}
        scalars[f"{done.prefix}grad_norm"] = jnp.sqrt(sum(norms.values()))
        finite |= {f"{done.prefix}{k}": jnp.isfinite(v.total) for k, v in losses_by_name(done.aux).items()}
        finite |= {f"gradient of {path}": jnp.isfinite(norm) for path, norm in norms.items()}
        finite |= {f"update of {path}": jnp.isfinite(u.value).all() for path, u in collect(done.aux, Update).items()}
    ok = jnp.stack(list(finite.values())).all()
    keep = lambda new, old: jnp.where(ok, new, old)
    with jax.named_scope("optimizer"):
        params = jax.tree.map(keep, done.params, state.params)
        opt_state = jax.tree.map(keep, done.opt_state, state.opt_state)
        average = jax.tree.map(keep, program.next_average(state, params), state.average)
    skips = {"total": state.skips["total"] + ~ok, "in_row": jnp.where(ok, 0, state.skips["in_row"] + 1)}
    state = replace(state, step=state.step + 1, params=params, opt_state=opt_state, skips=skips, average=average)
    details = {"by_layer": by_layer, "histograms": histograms}
    return state, {"scalars": scalars, **details, "ok": ok, "finite": finite, "skips": skips}


def report(aux: dict) -> dict[str, jax.Array]:
    """The scalars to log of an aux tree: "loss" (the objective), "loss/NAME" per term, and every metric by its path."""
    scalars = {"loss": objective(aux)}
    terms = losses_by_name(aux)
    if len(terms) > 1:
        scalars |= {f"loss/{name}": ratio(term.total, term.count) for name, term in terms.items()}
    for path, metric in collect(aux, Metric).items():
        metric = summed(metric)
        scalars[path] = ratio(metric.total, metric.count)
    return scalars


def report_by_layer(aux: dict) -> dict[str, jax.Array]:
    """Metrics of stacked layers, one value for each."""
    metrics = {path: metric for path, metric in collect(aux, Metric).items() if metric.total.ndim}
    return {path: ratio(metric.total, metric.count).reshape(-1) for path, metric in metrics.items()}


def eval_step(program: Program, params: dict, batch: dict) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Totals and counts of one held-out batch by name; adding them over batches gives exact means."""
    aux = program.experiment.method.evaluate(params, batch, program.context(None, train=False))
    terms = {f"loss/{name}": term for name, term in losses_by_name(aux).items()}
    metrics = {path: summed(metric) for path, metric in collect(aux, Metric).items()}
    return {name: (part.total, part.count) for name, part in {**terms, **metrics}.items()}
