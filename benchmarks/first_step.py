"""One program up to its first step, in a process of its own: python -m benchmarks.first_step PROGRAM [CACHE].

axrepro takes its whole way, the command that trains `dense_tiny`: it reads the text, opens the run's folder and writes
its first line. The others make their state and take a step on random tokens.
"""

import importlib
import sys
import tempfile


def _axrepro(cache: str | None) -> None:
    from axrepro.launch import run

    arguments = ["--experiment=dense_tiny", "--train.log_every=1"]
    if cache is not None:
        arguments.append(f"--train.compilation_cache={cache}")
    with tempfile.TemporaryDirectory() as workdir:
        run([*arguments, f"--workdir={workdir}"])


def _other(program: str, cache: str | None) -> None:
    if cache is not None:
        import jax

        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)
    from benchmarks.sizes import Sizes

    loss = importlib.import_module(f"benchmarks.{program}_program").make_step(Sizes())()
    print(f"step 1  loss {loss}", flush=True)


if __name__ == "__main__":
    name, cache = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    if name == "axrepro":
        _axrepro(cache)
    else:
        _other(name, cache)
