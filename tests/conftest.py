"""Every test runs on eight emulated CPU devices, and checks the annotations of axrepro at every call."""

import os

import jax
import jaxtyping
import numpy as np
import pytest

# before the first import of axrepro, so none stands at the top of this file; the workers of xdist read it too. An int
# passes for a float (PEP 484)
jaxtyping.install_import_hook("axrepro", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# tiny programs run once, so their time is that of code generation; XLA's passes over the whole program still run
jax.config.update("jax_disable_most_optimizations", True)
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")


def pytest_addoption(parser):
    parser.addoption("--goldens", action="store_true", help="write the golden files (make goldens)")


def pytest_collection_modifyitems(items):
    """The longest files start first, so that no process waits for another at the end."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in ("test_docs", "tests/train", "test_contract")))


@pytest.fixture
def unchecked():
    """Leaves annotations unchecked: for stand-ins, and for wrong types that the code itself has to refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def optimised():
    """Programs as they would run."""
    fast = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", fast)


@pytest.fixture
def assert_close():
    """Whether arrays, or all leaves of nested dicts, agree: norm of the difference over norm of the desired value."""
    from axrepro.core.tree import flatten

    def check(actual, desired, tolerance: float):
        if isinstance(desired, dict):
            actual, desired = flatten(actual), flatten(desired)
            assert actual.keys() == desired.keys()
            pairs = {name: (actual[name], desired[name]) for name in desired}
        else:
            pairs = {"value": (actual, desired)}
        for name, (a, d) in pairs.items():
            a, d = np.asarray(a, np.float64), np.asarray(d, np.float64)
            assert a.shape == d.shape, name
            error = np.linalg.norm(a - d) / max(np.linalg.norm(d), 1e-30)
            assert error <= tolerance, f"{name}: relative error {error:.3g} exceeds {tolerance:.3g}"

    return check
