"""An allocation that fails is told by what takes the memory, and what to change; exit code 3."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from faults import experiment, set_up
from runs import SMALL

from axrepro import launch as launcher
from axrepro.core import Loss, Method
from axrepro.core.param import linear
from axrepro.train.loop import compile_step, train
from axrepro.train.out_of_memory import OutOfMemoryError
from axrepro.train.workdir import Workdir


@dataclass(frozen=True, kw_only=True)
class Huge(Method):
    """It sorts 4 TiB of numbers, which must all exist at once."""

    def specs(self):
        return {"out": linear((8, 4), ("embed", "mlp"), fan_in=8)}

    def loss(self, params, batch, ctx):
        wide = jnp.sort(jnp.broadcast_to(params["out"].sum(), (1 << 40,)) * jax.random.uniform(ctx.key, (1 << 40,)))
        return {"wide": Loss.mean(wide[:8])}


def test_a_step_that_cannot_allocate_its_temporaries_says_how_large_they_are(tmp_path):
    with pytest.raises(OutOfMemoryError) as raised:
        train(experiment(Huge()), Workdir(str(tmp_path)), "huge")
    first, *table = str(raised.value).splitlines()
    assert first.startswith("out of memory while the step ran (could not allocate ")
    rows = {line.split("  ")[1].strip(): line for line in table if line.startswith("  ")}
    assert {"parameters", "optimizer state", "gradients", "batch", "step: arguments", "capacity"} <= rows.keys()
    temporaries = next(line for line in table if "step: temporaries" in line)
    assert float(temporaries.split()[2]) > 4096
    assert any("--train.remat=full" in line for line in table)
    assert any("--train.grad_accumulation=2" in line for line in table)
    assert any("--mesh.fsdp=-1" in line for line in table)
    assert isinstance(raised.value.__cause__, jax.errors.JaxRuntimeError)


def test_parameters_that_do_not_fit_end_the_launcher_with_code_3(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "set_up_platform", lambda args: None)
    arguments = (*SMALL, "--method.model.vocab_size=1000000000000", f"--workdir={tmp_path}")
    assert launcher.main(list(arguments)) == 3
    message = capsys.readouterr().err
    assert message.startswith("axrepro: out of memory before the first step (could not allocate ")
    assert "Traceback" not in message


def test_other_errors_of_the_runtime_stay_as_they_are():
    from axrepro.train.diagnostics import Diagnosis

    program, _, batch = set_up(experiment())
    diagnosis = Diagnosis(program, Workdir("unused"))
    diagnosis.compiled = compile_step(program, batch)
    diagnosis.explain(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    with pytest.raises(OutOfMemoryError, match="while the step ran"):
        diagnosis.explain(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."))
