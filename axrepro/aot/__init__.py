"""What a compiled program will do on the hardware it was compiled for, read before it ever runs there.

- `slices.py`, `compile.py`: the step, compiled for hardware that is not there.
- `program.py` with `loops.py`, `work.py`, `collectives.py`, `memory.py`: what it does, read from the compiler's notes.
- `network.py`, `step_time.py`, `efficiency.py`: how long it takes.   `lint.py`: what makes it slow without need.
- `forecast.py`, `search.py`, `report.py`, `page.py`: all of it together, the best settings, as text, JSON and a page.
- `analytic.py`: an estimate from the config alone, for GPUs.
"""
