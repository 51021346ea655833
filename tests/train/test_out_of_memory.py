"""An allocation that fails is told by what takes the memory, and what to change; exit code 3."""

import jax
import pytest
from faults import experiment, set_up
from launched import SMALL

from axrepro import launch as launcher
from axrepro.train.loop import compile_step
from axrepro.train.out_of_memory import OutOfMemoryError
from axrepro.train.workdir import Workdir


def test_logits_that_do_not_fit_end_the_launcher_with_code_3(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launcher, "set_up_platform", lambda args: None)
    arguments = (*SMALL, "--data.sequence_length=262144", f"--workdir={tmp_path}")
    assert launcher.main(list(arguments)) == 3
    message = capsys.readouterr().err
    assert message.startswith("axrepro: out of memory while the step ran (could not allocate ")
    assert "Traceback" not in message
    kinds = ("parameters", "optimizer state", "gradients", "batch", "step: temporaries", "--train.remat=full")
    assert all(kind in message for kind in kinds)


def test_other_errors_of_the_runtime_stay_as_they_are():
    from axrepro.train.diagnostics import Diagnosis

    program, _, batch = set_up(experiment())
    diagnosis = Diagnosis(program, Workdir("unused"))
    diagnosis.compiled = compile_step(program, batch)
    diagnosis.explain(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    for text in (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.",
        "INTERNAL: Error dispatching computation: Out of memory allocating 2475585378896 bytes.",
    ):
        with pytest.raises(OutOfMemoryError, match="while the step ran"):
            diagnosis.explain(jax.errors.JaxRuntimeError(text))
