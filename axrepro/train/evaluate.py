"""Held-out evaluation."""

import functools
import itertools

import jax

from axrepro.data import Batches
from axrepro.train.state import Program
from axrepro.train.step import eval_step


class Evaluator:
    """Means over the held-out split, exact whatever the batch size: totals and counts are added in float64."""

    def __init__(self, program: Program):
        self._program = program
        self._step = jax.jit(functools.partial(eval_step, program), out_shardings=program.replicated)
        self._data: Batches = program.experiment.data.batches(
            "eval", program.experiment.train.seed, program.run_mesh, program.experiment.rules
        )
        self._start = self._data.position()

    def __call__(self, params: dict, average: dict, batches: int | None) -> dict[str, float]:
        """The means by name, each with "eval/" in front; of the first `batches` batches, or of the whole split.

        They are those of the averaged parameters where the experiment averages them; with `eval.raw` those of `params`
        themselves follow, with "eval_raw/" in front. With text, "eval/bits_per_byte" is the code length of the raw
        bytes, end-of-document marks included.

        Args:
          params, average: as in `TrainState`.
        """
        scalars = {f"eval/{k}": v for k, v in self._means(self._program.averaged(params, average), batches).items()}
        if self._program.experiment.eval.raw:
            scalars |= {f"eval_raw/{name}": value for name, value in self._means(params, batches).items()}
        return scalars

    def _means(self, params: dict, batches: int | None) -> dict[str, float]:
        sums = {}
        self._data.seek(self._start)
        for batch in itertools.islice(self._data, batches):
            for name, parts in jax.device_get(self._step(params, batch)).items():
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + float(parts[0]), old[1] + float(parts[1]))
        stats = self._data.stats()
        means = {name: total / count if count else 0.0 for name, (total, count) in sums.items()}
        terms = {name: value for name, value in means.items() if name.startswith("loss/")}
        scalars = {"loss": sum(terms.values())} | {k: v for k, v in means.items() if k not in terms or len(terms) > 1}
        if "bits_per_token" in means and stats.get("bytes"):
            scalars["bits_per_byte"] = means["bits_per_token"] * stats["tokens"] / stats["bytes"]
        return scalars
