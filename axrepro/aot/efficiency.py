"""How near the parts of a chip come to their published rates, as fitted by `python -m benchmarks.step_time_model`."""

from axrepro.aot.step_time import Efficiency

_GUESS = Efficiency(product=0.85, attention=0.5, memory=0.85, link=0.85, host=0.8, overlap=0.2)
EFFICIENCY = {kind: _GUESS for kind in ("v4", "v5e", "v5p", "v6e", "v7x")}
