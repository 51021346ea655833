"""The report of a study says what the results say, and no more."""

import math
from pathlib import Path

from axrepro.study import figures, report
from axrepro.study.bootstrap import Estimate
from axrepro.study.results import Facts, Finding, Predicted, Results, Row
from axrepro.study.study import RULES, Arm, Expectation, Series

LESS, MORE, EITHER = -0.03, 0.03, 0.001  # differences of bits per byte whose interval of ±0.01 excludes 0, or holds it
SLICES = ("v5p-256", "v6e-256")


def around(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half)


def facts(arm: Arm, seconds: float, parts: dict[str, float], total: int = 2_345_678) -> Facts:
    return Facts(
        arm=arm,
        total=total,
        active=total // 2,
        outside=total // 3,
        tokens=4096,
        flops=6.0 * 4096 * total / 2,
        seconds=around(seconds, 0.02 * seconds),
        rounds=tuple(seconds * (1 + 0.01 * math.sin(k)) for k in range(12)),
        parts=parts,
        memory=300 << 20,
    )


def parts(seconds: float, routing: float = 0.0) -> dict[str, float]:
    shares = {"attention": 0.24, "feed-forward": 0.3, "head and loss": 0.2, "embedding": 0.04, "norms": 0.06}
    shares |= {"optimizer": 0.12, "other": 0.02}
    found = {name: share * (seconds - routing) for name, share in shares.items()}
    return found | ({"experts": 0.6 * routing, "dispatch": 0.3 * routing, "router": 0.1 * routing} if routing else {})


def curve(end: float, hours: float, seed: int) -> tuple[tuple[float, float], ...]:
    points = [k / 24 for k in range(1, 25)]
    wobble = lambda t: 0.01 * math.sin(9 * t + 2 * seed) + 0.008 * seed
    return tuple((hours * t, end + 1.2 * (t**-0.35 - 1) * 0.6 + wobble(t)) for t in points)


def ladder(
    differences: dict[str, float],
    rungs=("xs", "s", "m"),
    rules=RULES,
    seeds=(0, 1, 2),
    labels=("8 experts", "32 experts"),
) -> list[Row]:
    """Rows with the difference in bits per byte of every sparse arm by rule."""
    rows = []
    for scale, rung in enumerate(rungs):
        arms = [Arm(label="dense", experiment="moe_dense:tiny", changes=(("scale", rung),))]
        arms += [
            Arm(label=name, experiment="moe_dense:tiny_moe", changes=(("scale", rung), ("experts", name)))
            for name in labels
        ]
        base = 0.021 * 3.1**scale
        steps = 900 * 2**scale
        for rule in rules:
            for place, arm in enumerate(arms):
                increase = (0.0, 0.18, 0.31)[place]
                seconds = base * (1 + increase)
                moved = round(steps / (1 + increase)) if rule == "wall_clock" else steps
                bits = 2.4 - 0.16 * scale + (place and differences[rule] * (1 + 0.3 * (place - 1)))
                end = bits * 0.69
                hours = moved * seconds / 3600
                scores = {"bits_per_byte": around(bits, 0.012), "accuracy": around(0.42 + 0.03 * scale, 0.004)}
                scores["choice"] = around(0.5 + 0.06 * scale + 0.01 * place, 0.03)
                gain = {}
                if place:
                    gain = {"bits_per_byte": around(differences[rule] * (1 + 0.3 * (place - 1)), 0.01)}
                    gain |= {"accuracy": around(0.006 * place, 0.002), "choice": around(0.01 * place, 0.025)}
                rows.append(
                    Row(
                        rung=rung,
                        facts=facts(
                            arm, seconds, parts(seconds, (seconds - base) * 1.4 if place else 0), 10**6 * 3**scale
                        ),
                        dense=not place,
                        rule=rule,
                        steps=moved,
                        tokens=moved * 4096.0,
                        flops=moved * 1.5e12,
                        hours=hours,
                        increase=around(increase, 0.02) if place else None,
                        scores=scores,
                        gain=gain,
                        same_step_time={s: around(g.value + 0.01, 0.02) for s, g in gain.items()} if scale < 2 else {},
                        seeds=seeds,
                        missing=(),
                        commands=tuple(
                            f"python -m axrepro.launch --experiment={arm.experiment} --seed={s}" for s in seeds
                        ),
                        curves=tuple(curve(end, hours, seed) for seed in seeds),
                        loads=tuple(load(8 * 4 ** (place - 1), 0.3 + 0.3 * k) for k in range(4)) if place else (),
                        dropped=0.03 * place if place else None,
                    )
                )
    return rows


def load(number: int, slope: float) -> tuple[float, ...]:
    weights = [math.exp(-slope * k / number) for k in range(number)]
    return tuple(weight / sum(weights) for weight in weights)


def series(name: str, values: tuple[float, ...], *expected: Expectation) -> Series:
    arms = tuple(
        Arm(label=f"{name} {x:g}", experiment="moe_dense:tiny_moe", changes=((name, f"{x}"),), x=x) for x in values
    )
    return Series(name=name, arms=arms, dense=Arm(label="dense", experiment="moe_dense:tiny"), expected=expected)


ABLATIONS = (
    series("experts", (4, 8, 16), Expectation(measure="step_time", direction="stays")),
    series("capacity factor", (1, 1.25, 2), Expectation(measure="dropped", direction="falls")),
    series("every k-th layer", (1, 2, 4), Expectation(measure="step_time", direction="falls")),
    series("balance weight", (0, 0.01), Expectation(measure="busiest", direction="falls")),
    series("z-loss weight", (0, 0.001), Expectation(measure="router_logits", direction="falls")),
    series("experts chosen", (1, 2, 4), Expectation(measure="bits_per_byte", direction="falls")),
)
ABOUT = {"step_time": 0.031, "dropped": 0.12, "busiest": 2.3, "router_logits": 1.4, "bits_per_byte": 2.31}


def findings() -> list[Finding]:
    found = []
    for place, one in enumerate(ABLATIONS):
        for expectation in one.expected:
            about, end = ABOUT[expectation.measure], (0.04, -0.5, -0.3, -0.4, 0.001, 0.02)[place]
            last = len(one.arms) - 1
            values = tuple(around(about * (1 + end * k / last), 0.03 * about) for k in range(last + 1))
            relative = expectation.measure == "step_time"
            change = around(end if relative else values[-1].value - values[0].value, 0.05 * (1 if relative else about))
            verdict = ("held", "held", "held", "held", "open", "did not hold")[place]
            found.append(Finding(series=one, expectation=expectation, values=values, change=change, verdict=verdict))
    return found


def forecast(where: str, name: str, arm: Arm, seconds: float, increase: float | None, error: str = "") -> Predicted:
    shares = {"matrix products": 0.55, "attention": 0.12, "other compute": 0.08, "waiting: all-gather over fsdp": 0.1}
    shares |= {"waiting: reduce-scatter over fsdp": 0.05, "slowed by: all-gather over fsdp": 0.04, "copies": 0.02}
    shares |= {"waiting: all-to-all over expert": 0.03, "host memory": 0.005, "core stands still": 0.005}
    size = 0 if error else 1
    return Predicted(
        slice=name,
        where=where,
        arm=arm,
        dense=increase is None,
        seconds=seconds * size,
        parts={} if error else {part: seconds * share for part, share in shares.items()},
        mfu=0.512 * size,
        flops=1e18 * size,
        tokens=4_194_304 * size,
        total=27_000_000_000 * size,
        active=6_400_000_000 * size,
        outside=6_000_000_000 * size,
        memory=(61 << 30) * size,
        capacity=(95 << 30) * size,
        fits=not error,
        increase=None if error else increase,
        training_tokens={} if error else {"wall_clock": 1.1e11, "tokens": 1.28e11, "flops": 9.1e10},
        mesh={} if error else {"data": 4, "fsdp": 16, "expert": 4},
        error=error,
    )


def forecasts() -> list[Predicted]:
    found = []
    for place, name in enumerate(SLICES):
        for scale, rung in enumerate(("6.4B", "12.6B", "29.6B")):
            seconds = 3.1 * 1.9**scale * (1 + 0.4 * place)
            found.append(forecast(rung, name, Arm(label="dense", experiment="d"), seconds, None))
            error = "does not compile: sizes do not divide" if scale == 2 and place else ""
            arm = Arm(label="64 experts in every 4th layer", experiment="m")
            found.append(forecast(rung, name, arm, seconds * 1.17, 0.17, error))
        for one in (ABLATIONS[0], ABLATIONS[1], ABLATIONS[2]):
            for k, arm in enumerate(one.arms):
                found.append(forecast(one.name, name, arm, 3.5 + 0.1 * k, 0.12 + 0.03 * k + 0.05 * place))
    return found


def results(wall_clock: float = LESS, tokens: float = LESS, flops: float = EITHER, **how) -> Results:
    rows = ladder({"wall_clock": wall_clock, "tokens": tokens, "flops": flops}, **how)
    shown = [row.facts for row in rows if row.rule == rows[0].rule]
    shown.append(facts(ABLATIONS[0].dense, 0.026, parts(0.026)))
    for one in ABLATIONS[:3]:
        for k, arm in enumerate(one.arms):
            shown.append(facts(arm, 0.031 + 0.002 * k, parts(0.031 + 0.002 * k, 0.006)))
    return Results(
        study="moe_vs_dense",
        conditions={"hardware": "2 cores of a CPU", "jax": "0.10.2", "data": "text | bytes"},
        rows=tuple(rows),
        facts=tuple(shown),
        findings=tuple(findings()),
        predicted=tuple(forecasts()),
        not_run=("moe_dense:huge: out of memory",),
    )


if __name__ == "__main__":
    import sys

    report.write(results(), Path(sys.argv[1]))
