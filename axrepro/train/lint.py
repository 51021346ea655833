"""Looks for silent no-ops before a job: settings without effect, losses that get lost, memory that is not shared.

Nothing is compiled and no array is made: the loss is traced once, without a mesh. What it finds stops the job, unless
`Experiment.allow` names it.
"""

import ast
import inspect
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache, partial
from pathlib import Path

import jax
import jax.interpreters.partial_eval as pe
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from axrepro.core.aux import Update, collect, objective, observing_losses
from axrepro.core.config import override, walk
from axrepro.core.interfaces import Method
from axrepro.core.param import abstract_params
from axrepro.core.reads import recording_reads
from axrepro.core.remat import policy_of
from axrepro.core.sharding import param_partitions, shard_bytes
from axrepro.core.tree import fill, flatten, matches, select
from axrepro.errors import UserError, nearest
from axrepro.train.experiment import Experiment
from axrepro.train.hardware import CHIPS
from axrepro.train.state import Program

_WASTE = 0.1  # of the bytes a device holds in parameters: what one parameter may add by being kept whole
_MEBIBYTE = 2**20
_MARK = "loss made here:"


@dataclass(frozen=True)
class Finding:
    """One silent fault.

    Attributes:
      kind: short name, see `KINDS`.   path: of the field or parameter.   fault, fix: what is wrong, and the remedy.
    """

    kind: str
    path: str
    fault: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: {self.fault}; {self.fix} [{self.kind}]"


KINDS = {
    "mesh-rule": "a mesh rule that matches no hardware, comes after one that takes all of its, or changes nothing",
    "unread-field": "a field that was set and that nothing reads",
    "remat": "a rematerialisation policy, or a name in one, that matches no activation",
    "decay": "a weight decay that decays no parameter",
    "products": "8-bit products that no layer of the model takes",
    "lost-loss": "a loss that a layer makes and that never reaches the total",
    "unused-parameter": "a trained parameter on which no loss depends",
    "no-update": 'a parameter of role "updated" that gets no Update',
    "replicated": "a large parameter kept whole on devices that could share it",
}


def lint(
    original: Experiment, experiment: Experiment, where: str, sizes: Mapping[str, int], overridden: tuple[str, ...] = ()
) -> list[Finding]:
    """All findings but those that `experiment.allow` names.

    Args:
      original: what the experiment's function returned.   experiment: with mesh rules and overrides applied.
      where: name of the hardware.   sizes: devices per mesh axis.   overridden: paths that the command line sets.
    Raises:
      UserError: for what is wrong without being silent: patterns, rules and shapes that do not fit.
    """
    for entry in experiment.allow:
        if (kind := entry.partition(":")[0]) not in KINDS:
            raise UserError(f"allow={entry!r} names no kind of finding; {nearest(kind, KINDS)}")
    if (accumulation := experiment.train.grad_accumulation) > 1:
        rows = experiment.data.batch_size // accumulation
        try:
            experiment.rules.spec(("batch",), (rows,), sizes)
        except UserError as error:
            raise UserError(f"train.grad_accumulation={accumulation} leaves {rows} rows at a time: {error}") from None
    program = Program(experiment, mesh=None, platform="cpu")
    for path, spec in flatten(program.specs).items():
        try:
            experiment.rules.check(spec.axes)
        except UserError as error:
            raise UserError(f"parameter {path!r}: {error}") from None
    found = [*_mesh_rules(original, where), *_replicated(program, sizes), *_traced(program, overridden)]
    return [finding for finding in found if not any(_names(entry, finding) for entry in experiment.allow)]


def _names(entry: str, finding: Finding) -> bool:
    kind, _, path = entry.partition(":")
    return kind == finding.kind and (not path or matches(finding.path.replace(".", "/"), path.replace(".", "/")))


def require_clean(
    original: Experiment, experiment: Experiment, where: str, sizes: Mapping[str, int], overridden: tuple[str, ...] = ()
) -> None:
    """Raises UserError with every finding of `lint`, its fix, and how to allow what is meant."""
    found = lint(original, experiment, where, sizes, overridden)
    if not found:
        return
    text = str(found[0])
    if len(found) > 1:
        listed = "; ".join(f"({i}) {finding}" for i, finding in enumerate(found, 1))
        text = f"{len(found)} settings without the effect they promise: {listed}"
    raise UserError(f"{text}; if it is meant, --experiment.allow={found[0].kind}:{found[0].path}")


@cache
def _hardware_names() -> tuple[str, ...]:
    counts = sorted({2**i for i in range(15)} | {2**i * 3 for i in range(13)} | {2**i * 5 for i in range(12)})
    return tuple(f"{chip}-{count}" for chip in (*CHIPS, "cpu") for count in counts)


def _mesh_rules(experiment: Experiment, where: str) -> list[Finding]:
    found, taken = [], set()
    for index, rule in enumerate(experiment.mesh_rules):
        path, faulty = f"mesh_rules.{index}", partial(Finding, "mesh-rule", f"mesh_rules.{index}")
        try:
            changed = override(experiment, dict(rule.changes))
            mine = {name for name in _hardware_names() if re.fullmatch(rule.match, name)}
            first = re.fullmatch(rule.match, where) and where not in taken
        except UserError as error:
            raise UserError(f"{path} ({rule.match!r}): {error}") from None
        if not mine and not first:
            names = f"a name is KIND-COUNT, such as v5p-1024, with KIND one of {', '.join([*CHIPS, 'cpu'])}"
            found.append(faulty(f"{rule.match!r} matches no hardware", names))
        elif mine and mine <= taken:
            fault = f"{rule.match!r} never applies: the rules before it take all that it matches"
            found.append(faulty(fault, "put it before them, or delete it"))
        elif not rule.changes:
            found.append(faulty(f"{rule.match!r} changes nothing", "give it changes, or delete it"))
        elif first and changed == experiment:
            fault = f"{rule.match!r} applies to {where} and sets every field to what it is"
            found.append(faulty(fault, "delete it, or give it other values"))
        taken |= mine | ({where} if first else set())
    return found


def _replicated(program: Program, sizes: Mapping[str, int]) -> list[Finding]:
    """Parameters whose copies cost a device much more than its share would."""
    shared = {axis: size for axis, size in sizes.items() if axis in ("stage", "fsdp", "expert", "model") and size > 1}
    ways, specs = math.prod(shared.values()), flatten(program.specs)
    partitions = flatten(param_partitions(program.specs, program.experiment.rules, sizes))
    width = {path: jnp.dtype(spec.dtype).itemsize for path, spec in specs.items()}
    here = {path: shard_bytes(spec.shape, width[path], partitions[path], sizes) for path, spec in specs.items()}
    allowed, found = max(_WASTE * sum(here.values()), _MEBIBYTE), []
    for path, spec in specs.items():
        whole = spec.size * width[path]
        if here[path] - whole / ways > allowed:
            fault = (
                f"{here[path] / _MEBIBYTE:,.0f} MiB of shape {spec.shape} are kept {here[path] * ways // whole} times "
                f"on mesh axes {' × '.join(f'{axis} {n}' for axis, n in shared.items())}"
            )
            fix = f"its axes are {spec.axes}: give one a mesh axis in `rules` that divides it, or change the mesh"
            found.append(Finding("replicated", path, fault, fix))
    return found


def _traced(program: Program, overridden: tuple[str, ...]) -> list[Finding]:
    """What only a trace of the loss shows."""
    experiment, found, watch = program.experiment, [], _Losses(program.experiment)
    names, blocks, used, updates = set(), 0, set(), set()
    with recording_reads(experiment) as read:
        params, batch = abstract_params(program.specs), experiment.data.abstract()
        _trace_apart_from_loss(program, params, batch)
        for phase in program.phases:
            jaxpr, kept_inputs, updated = _loss_jaxpr(program, phase.name, params, batch, watch)
            names |= _named(jaxpr)
            blocks += sum(
                e.params.get("policy") is not None for e in _equations(jaxpr)
            )  # only `rematerialised` has one
            trained = flatten(program.trained(phase))
            used |= {path for path, kept in zip(flatten(params), kept_inputs, strict=False) if kept} & trained.keys()
            updates |= updated
    for path in sorted(program.trained_paths - used):
        fix = 'use it, remove it, or give it the role "frozen"'
        found.append(Finding("unused-parameter", path, "it is trained, but no loss depends on it", fix))
    for path, spec in flatten(program.specs).items():
        if spec.role == "updated" and path not in updates:
            fix = "return Update(new value) under its path"
            found.append(Finding("no-update", path, 'its role is "updated", but the method returns no Update', fix))
    for path, optimizer, specs in experiment.optimizer.parts(program.trained_specs):
        if getattr(optimizer, "weight_decay", 0) and not any(spec.decay for spec in flatten(specs).values()):
            here = ".".join(filter(None, ("optimizer", path, "weight_decay")))
            found.append(Finding("decay", here, "it decays none of its parameters", "set it to 0, or `Param.decay`"))
    found += watch.lost()
    found += _remat(experiment.train.remat, names, blocks)
    if experiment.train.products.format != "exact" and "product" not in names:
        fault = f"{experiment.train.products} applies to no product of this model"
        found.append(Finding("products", "train.products", fault, "name parts that it has, or set the format to exact"))
    return found + _unread(experiment, read, overridden)


def _trace_apart_from_loss(program: Program, params: dict, batch: dict) -> None:
    """Runs what reads a config besides the training loss, on shapes alone."""
    experiment, method = program.experiment, program.experiment.method
    shapes = {name: x.shape for name, x in batch.items()}
    key = _abstract_key()
    method.check(shapes, None)
    method.flops(shapes)
    jax.eval_shape(lambda p, b: method.evaluate(p, b, program.context(None, train=False)), params, batch)
    if type(method).rollout is not Method.rollout:
        jax.eval_shape(lambda p, b, k: method.rollout(p, b, program.context(k, train=False)), params, batch, key)
    for phase in program.phases:
        trained = select(params, set(flatten(program.trained(phase))).__contains__)
        optimizer = program.optimizers[phase.name]
        jax.eval_shape(lambda p, o=optimizer: o.update(p, o.init(p), p), trained)
        jax.eval_shape(lambda p, o=optimizer, ph=phase: program.learning_rates({ph.name: o.init(p)}, ph), trained)
        if type(method).gradients is not Method.gradients:
            rest = select(params, lambda path, own=flatten(trained): path not in own)

            def gradients(active, rest, batch, key, phase=phase):
                ctx = program.context(key, train=True, phase=phase.name)
                loss = lambda a, b, c: method.loss(fill(program.specs, a, rest), b, c)
                return method.gradients(loss, active, batch, ctx, experiment.train.grad_accumulation)

            jax.eval_shape(gradients, trained, rest, batch, key)


def _abstract_key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _loss_jaxpr(program: Program, phase: str, params: dict, batch: dict, watch: "_Losses"):
    """(jaxpr of the total loss of a phase, whether it depends on each leaf of the params, paths that get an Update)."""
    updates = set()

    def total(params, batch, key):
        aux = program.experiment.method.loss(params, batch, program.context(key, train=True, phase=phase))
        updates.update(collect(aux, Update))
        return objective(aux)

    with watch.tracing():
        jaxpr = jax.make_jaxpr(total)(params, batch, _abstract_key()).jaxpr
    alive, inputs = pe.dce_jaxpr(jaxpr, [True])
    watch.keep(_named(alive))
    return jaxpr, inputs[: len(flatten(params))], updates


class _Losses:
    """Marks every loss where it is made, and knows which marks were gone from what the total is computed from."""

    def __init__(self, experiment: Experiment):
        self._paths = {id(node): path for path, node in walk(experiment)}
        self._made: set[str] = set()
        self._lost: set[str] = set()

    def tracing(self):
        """While a loss is traced."""
        self._made = set()
        return observing_losses(self._mark)

    def _mark(self, total: jax.Array) -> jax.Array:
        frame = caller = sys._getframe(2)  # the caller of Loss.mean
        while frame is not None and id(frame.f_locals.get("self")) not in self._paths:
            frame = frame.f_back
        path, frame = ("method", caller) if frame is None else (self._paths[id(frame.f_locals["self"])], frame)
        name = f"{_MARK}{path} {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self._made.add(name)
        return checkpoint_name(total, name)

    def keep(self, names: set[str]) -> None:
        """Takes the names that are left in the computation of the total."""
        self._lost |= self._made - names

    def lost(self) -> list[Finding]:
        """A finding per place."""
        fix = "a layer that calls it drops the aux that it returns: pass it on under the child's name"
        split = [name.removeprefix(_MARK).split(" ") for name in sorted(self._lost)]
        return [Finding("lost-loss", path, f"its loss ({where}) never reaches the total", fix) for path, where in split]


def _equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jex.jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _named(jaxpr) -> set[str]:
    """The names given to activations."""
    return {equation.params["name"] for equation in _equations(jaxpr) if equation.primitive.name == "name"}


def _remat(policy: str, names: set[str], blocks: int) -> list[Finding]:
    chosen, faulty = policy_of(policy), partial(Finding, "remat", "train.remat")
    if chosen is None:
        return []
    if not blocks:
        fault = f"{policy!r} applies to nothing: no layer of this model is rematerialised"
        return [faulty(fault, "stack `Block` layers, or set train.remat=none")]
    wanted = (*chosen.save, *chosen.offload)
    unmatched = [name for name in wanted if name not in names]
    written_out = ":" in policy
    if unmatched and (written_out or len(unmatched) == len(wanted)):
        known = sorted(name for name in names if not name.startswith(_MARK))
        return [faulty(f"{policy!r} keeps {unmatched[0]!r}, which names no activation", nearest(unmatched[0], known))]
    return []


def _unread(experiment: Experiment, read: set[tuple[str, str]], overridden: tuple[str, ...]) -> list[Finding]:
    """Fields of method, optimizer and data that differ from their default, or were set, and that nothing reads."""
    found: list[Finding] = []
    for path, node in walk(experiment):
        root = path.partition(".")[0]
        if root not in ("method", "optimizer", "data") or any(path.startswith(f.path) for f in found):
            continue
        for field in fields(node):
            here, value = f"{path}.{field.name}", getattr(node, field.name)
            was_set = here in overridden or field.default is MISSING or value != field.default
            is_read = field.name in _read_in_source(type(node)) if root == "data" else (path, field.name) in read
            if was_set and not is_read:
                fault = f"{value!r} has no effect: {type(node).__name__} never reads it in this experiment"
                found.append(Finding("unread-field", here, fault[:200], "remove it, or the setting that makes it idle"))
    return found


@cache
def _read_in_source(cls: type) -> frozenset[str]:
    """Names read as attributes in the modules that define a class, the checks of `__post_init__` left out."""
    names: set[str] = set()
    for module in {inspect.getmodule(base) for base in cls.__mro__ if base is not object}:
        try:
            # pyrefly: ignore[bad-argument-type]  # None, of a class without a module, raises TypeError
            tree = ast.parse(inspect.getsource(module))
        except (OSError, TypeError):
            return frozenset(field.name for field in fields(cls))  # typed into a prompt: there is no source to read
        names |= _attributes(tree)
    return frozenset(names)


def _attributes(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
        return set()
    own = {node.attr} if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) else set()
    return own.union(*map(_attributes, ast.iter_child_nodes(node)))
