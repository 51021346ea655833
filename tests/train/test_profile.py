"""A profile names operations by layer, adds up self times, and sees idle time; on traces of CPU, GPU and TPU form."""

import pytest
from faults import experiment
from jax.profiler import ProfileData

from axrepro.core.config import override
from axrepro.errors import UserError
from axrepro.train.loop import train
from axrepro.train.profile import summarise
from axrepro.train.workdir import Workdir

HLO = """HloModule jit_train_step

%fused (p.1: f32[8,8]) -> f32[8,8] {
  %p.1 = f32[8,8]{1,0:T(8,128)} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0:T(8,128)} dot(%p.1, %p.1), metadata={op_name="jit(f)/jvp(layers)/while/body/ffn/dot_general"}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %fusion.7 = f32[8,8]{1,0:T(8,128)} fusion(%x), calls=%fused, metadata={op_name="jit(f)/jvp(layers)/while/body/ffn/dot_general"}
  %exp.2 = f32[8,8]{1,0} exponential(%x), metadata={op_name="jit(f)/transpose(jvp(layers))/while/body/attention/dot_product_attention/exp"}
  %all-reduce.3 = f32[8,8]{1,0} all-reduce(%x), metadata={op_name="jit(f)/add"}
  %while.4 = (s32[], f32[8,8]{1,0:T(8,128)}) while(%x), metadata={op_name="jit(f)/jvp(layers)/while"}
  %copy.5 = f32[8,8]{1,0} copy(%x)
}
"""  # noqa: E501


def planted(plane: str, line: str, named: bool) -> ProfileData:
    """A loop of 60 us around a product of 30 and an exponential of 20, a collective of 10, 20 idle, a copy of 10."""
    names = {1: "while.4", 2: "fusion.7", 3: "exp.2", 4: "all-reduce.3", 5: "copy.5"}
    spans = [(1, 0, 60), (2, 5, 30), (3, 38, 20), (4, 60, 10), (5, 90, 10)]
    stat = lambda index: f"stats {{ metadata_id: 1 ref_value: {index + 10} }}" if named else ""
    events = "".join(
        f"events {{ metadata_id: {i} offset_ps: {start * 10**6} duration_ps: {time * 10**6} {stat(i)} }}"
        for i, start, time in spans
    )
    of = (lambda name: f"kernel_of_{name}") if named else (lambda name: f"%{name} = f32[8,8] something(%x)")
    metadata = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{of(n)}" }} }}' for i, n in names.items())
    metadata += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }'
    metadata += "".join(
        f'stat_metadata {{ key: {i + 10} value {{ id: {i + 10} name: "{n}" }} }}' for i, n in names.items()
    )
    twice = f'lines {{ id: 2 name: "Framework Name Scope" {events} }}'  # the same time again, by scope
    lines = f'lines {{ id: 1 name: "{line}" {events} }}' + twice * plane.startswith("/device")
    text = f'planes {{ name: "{plane}" {lines} {metadata} }}'
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


@pytest.mark.parametrize(
    ("plane", "line", "named"),
    [
        ("/device:TPU:0", "XLA Ops", False),
        ("/device:GPU:0", "Stream #13(Compute)", True),
        ("/host:CPU", "tf_XLAPjRtCpuClient/1", True),
    ],
)
def test_self_times_kinds_and_idle_time_of_a_planted_trace(plane, line, named):
    summary = summarise(planted(plane, line, named), HLO)
    times = {op.label: round(op.seconds * 1e6, 3) for op in summary.operations}
    assert times == {
        "layers/ffn/dot_general": 30,
        "layers/attention/dot_product_attention/exp (backward)": 20,
        "layers": 10,  # the loop without its body
        "add": 10,
        "copy.5": 10,
    }
    kinds = {kind: round(share * 80) for kind, share in summary.kinds().items()}
    assert kinds == {"matrix products": 30, "attention": 20, "control flow": 10, "collectives": 10, "copies": 10}
    assert (round(summary.seconds * 1e6), round(summary.busy * 1e6)) == (100, 80)


def test_a_run_leaves_a_trace_and_a_summary_that_names_layers(tmp_path, capsys):
    config = override(experiment(), {"diagnostics.profile_at": 3, "diagnostics.profile_steps": 2})
    train(config, Workdir(str(tmp_path)), "stack")
    text = (tmp_path / "profile" / "summary.txt").read_text()
    assert text.startswith("profile of steps 3 to 4: ")
    assert text in capsys.readouterr().out
    assert "layers/inner/dot_general" in text
    assert "matrix products" in text
    (trace,) = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    steps = [  # the product of each of 4 layers, in each of two steps, on each of 8 devices
        op for op in summarise(ProfileData.from_file(str(trace))).operations if op.count % 16 == 0
    ]
    assert steps


def test_a_window_beyond_the_run_is_refused_and_one_cut_short_is_told(tmp_path):
    with pytest.raises(UserError, match=r"profile_at=9 is beyond the last step, train\.steps=8"):
        override(experiment(), {"diagnostics.profile_at": 9})
    train(override(experiment(), {"diagnostics.profile_at": 7}), Workdir(str(tmp_path)), "stack")
    assert (tmp_path / "profile" / "summary.txt").read_text().startswith("profile of steps 7 to 8: ")


def test_a_window_before_the_step_where_a_run_resumes_is_told(tmp_path, capsys):
    train(experiment(steps=4), Workdir(str(tmp_path)), "stack")
    train(
        override(experiment(), {"diagnostics.profile_at": 2, "diagnostics.profile_steps": 2}),
        Workdir(str(tmp_path)),
        "stack",
    )
    assert "the profile of steps 2 to 3 lies before step 5" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()
