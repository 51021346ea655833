"""What happens when a loss or gradient is inf or nan."""

from collections.abc import Callable

import jax

from axrepro.train.experiment import Train
from axrepro.train.state import TrainState


class NotFiniteError(RuntimeError):
    """A loss, gradient or update that is not finite ended the run; the message names the step and the tensors."""


class Monitor:
    """Looks at each step's report one step late, so that the devices never wait for the host.

    The step itself changes no parameter when something is not finite, so nothing is lost by the delay.
    """

    def __init__(
        self,
        settings: Train,
        search: Callable[[int, TrainState, dict], str],
        skipped: Callable[[int, str], None],
    ):
        """
        Args:
          search: what (step, a state with its parameters, its batch) tells of the first such step.
          skipped: told of each step that is left out, and why.
        """
        self._search, self._tell = search, skipped
        self._skip = settings.not_finite == "skip"
        self._max_in_row = settings.max_skips
        self._last: tuple[int, dict, dict] | None = None
        self._total, self._searched = 0, False

    def push(self, step: int, state: TrainState, batch: dict, report: dict) -> None:
        """Takes a step's batch, report, and the state after it, and checks the step before."""
        self.flush(state)
        self._last = (step, batch, report)

    def flush(self, state: TrainState) -> None:
        """Checks the report that is still waiting.

        Args:
          state: the newest; a bad step changes no parameter, so it holds those of that step, or of one step more.
        Raises:
          NotFiniteError: if it is not finite and may not be skipped.
        """
        if self._last is None:
            return
        (step, batch, report), self._last = self._last, None
        skips = jax.device_get(report["skips"])
        in_row, self._total = int(skips["in_row"]), int(skips["total"])
        if not in_row:
            return
        bad = [name for name, finite in jax.device_get(report["finite"]).items() if not finite]
        text = f"step {step} is not finite: {bad[0]!r}, {len(bad)} of {len(report['finite'])} tensors"
        if not self._searched:  # once per start, since a search takes a compilation
            self._searched = True
            text += f"; {self._search(step, state, batch)}"
        if not self._skip:
            raise NotFiniteError(
                f"{text}; no parameter was changed by it (train.not_finite=skip leaves such steps out)"
            )
        if in_row > self._max_in_row:
            raise NotFiniteError(f"{text}; {in_row} in a row are more than train.max_skips={self._max_in_row}")
        self._tell(step, text)

    def scalars(self) -> dict[str, float]:
        """The number of steps left out, once there are any."""
        return {"skipped_steps": float(self._total)} if self._total else {}
