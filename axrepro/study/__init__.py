"""Studies: many runs whose comparison answers one question, such as dense or mixture of experts at equal step time.

The way of an answer: a `Study` (study.py) names experiments. `step_time.py` measures how long their steps take, with
`breakdown.py` what they go to, and `measured.py` keeps it; `budget.py` turns times and a rule into numbers of steps,
and `plan.py` these into runs. `sweep.py` trains and scores every one, as the launcher would, by `held_out.py`.
`forecasts.py` adds what cannot be run here. `compare.py` reads all of it back from the folder, with the intervals of
`bootstrap.py`, as the `results.py` that `report.py`, `figures.py` and `tables.py` tell in the words of `wording.py`.
"""
