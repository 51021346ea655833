"""Studies: many runs whose comparison answers one question, such as dense or mixture of experts at equal step time.

The way of an answer: a `Study` (study.py) names experiments; `step_time.py` measures how long their steps take, and
`budget.py` turns times and a rule into numbers of steps; `sweep.py` trains and evaluates every cell, each a run of the
ordinary trainer that the launcher would repeat; `held_out.py` scores it by document and by question, and `bootstrap.py`
puts intervals on differences; `forecasts.py` adds what cannot be run here; `results.py` reads all of it back from the
folder, for `report.py` and `figures.py`.
"""
