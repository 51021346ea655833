"""What happens when a loss or gradient is inf or nan."""

import jax

from axrepro.train.experiment import Train


class NotFiniteError(RuntimeError):
    """A loss, gradient or update that is not finite ended the run; the message names the step and the tensors."""


class Monitor:
    """Looks at each step's report one step late, so that the devices never wait for the host.

    The step itself changes no parameter when something is not finite, so nothing is lost by the delay.
    """

    def __init__(self, settings: Train):
        self._skip = settings.not_finite == "skip"
        self._max_in_row = settings.max_skips
        self._last: tuple[int, dict] | None = None
        self._total = 0

    def push(self, step: int, report: dict) -> None:
        """Takes the report of a step and checks the one before it."""
        self.flush()
        self._last = (step, report)

    def flush(self) -> None:
        """Checks the report that is still waiting.

        Raises:
          NotFiniteError: if it is not finite and may not be skipped.
        """
        if self._last is None:
            return
        (step, report), self._last = self._last, None
        skips = jax.device_get(report["skips"])
        in_row, self._total = int(skips["in_row"]), int(skips["total"])
        if not in_row:
            return
        bad = [name for name, finite in jax.device_get(report["finite"]).items() if not finite]
        text = f"step {step} is not finite: first {bad[0]!r}, {len(bad)} of {len(report['finite'])} tensors"
        if not self._skip:
            raise NotFiniteError(
                f"{text}; no parameter was changed by it (train.not_finite=skip leaves such steps out)"
            )
        if in_row > self._max_in_row:
            raise NotFiniteError(f"{text}; {in_row} in a row are more than train.max_skips={self._max_in_row}")
        if jax.process_index() == 0:
            print(f"skipped: {text}", flush=True)

    def scalars(self) -> dict[str, float]:
        """The number of steps left out, once there are any."""
        return {"skipped_steps": float(self._total)} if self._total else {}
