"""python -m axrepro.data: what a person sees of the data."""

import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from axrepro.data import DecodeImage, MultiCrop, NormaliseImage
from axrepro.data.__main__ import main
from axrepro.data.tools.show import _each


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a module `mine` whose functions return data."""
    lines = [f'{{"question": "{i} + {i}?", "answer": "{2 * i}"}}' for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    (tmp_path / "play.txt").write_text("\n\n".join(f"Speech {i}.\nSecond line." for i in range(40)))
    (tmp_path / "mine.py").write_text(
        """
from axrepro.data import *
from axrepro.data.transforms.denoising import SpanCorruption
from axrepro.data.transforms.formats import Template

def sums():
    return Text(
        batch_size=8, sequence_length=64, source=JsonLines("sums.jsonl", holdout=0), packing=BestFit(), loss_mask=True,
        transforms=(Template(template="Q: {question} A: {answer}", loss=("answer",)),),
    )

def mixed():
    play = Text(batch_size=1, sequence_length=64, source=TextFiles("play.txt", separator="\\\\n\\\\n", holdout=0))
    return Mixture(batch_size=8, parts=(Part(name="a", data=play), Part(name="b", data=play, rate=3.0)))

def corrupted():
    vocabulary = Bytes(extra_ids=20)
    return Text(
        batch_size=2, sequence_length=64, source=TextFiles("play.txt", holdout=0), vocabulary=vocabulary, shuffle=False,
        row_transforms=(SpanCorruption(vocabulary=vocabulary),),
    )

def broken():
    raise RuntimeError("not today")

def nothing():
    return 5
""".replace("\\\\n", "\\n")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_wrong_speed_or_folder_of_pictures_is_one_line(folder, capsys):
    (folder / "file").write_text("")
    (folder / "pictured.py").write_text(
        "import numpy as np\nfrom functools import partial\nfrom axrepro.data import *\n"
        "def records(number, split):\n    return [{'image': np.zeros((4, 4, 3), np.uint8)}] * number\n"
        "def views():\n    return Pipeline(batch_size=2, source=FromFunction(partial(records, 4)),"
        " features=(Feature(name='image', shape=(4, 4, 3), dtype='uint8'),))\n"
    )
    for argument, message in (
        ("--seconds=nan", "must be a number above 0"),
        ("--pictures=file/x", "cannot write pictures"),
    ):
        assert main(["--data=pictured:views", "--show=1", "--seconds=0.05", argument]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_normalising_within_views_is_found():
    views = MultiCrop.dino(num_local=1, global_size=8, local_size=4)
    (found, *_) = [t for t in _each((DecodeImage(), views)) if isinstance(t, NormaliseImage)]
    assert found == NormaliseImage()


def shown(capsys, *argv) -> str:
    assert main([*argv, "--seconds=0.05"]) == 0
    return capsys.readouterr().out


def test_text_is_decoded_with_its_segments_and_what_does_not_count_in_brackets(folder, capsys):
    out = shown(capsys, "--data=mine:sums", "--show=2")
    assert re.search(r"40 documents, \d+ tokens", out)
    assert out.count("\nexample ") == 2
    segments = re.findall(r"segment \d+: places (\d+) to (\d+)\n    (.*)", out)
    assert len(segments) >= 4
    for first, last, text in segments:
        question = re.fullmatch(r"⟦Q: (\d+) \+ \1\? A: ⟧(\d+)¶", text)
        assert question
        assert int(question[2]) == 2 * int(question[1])
        assert int(last) - int(first) + 1 == len(text) - 2  # the brackets; one byte a character
    assert re.search(r"\d+ targets in the loss", out)
    assert re.search(r"[\d,.]+ batches/s, .* tokens/s", out)
    assert float(re.search(r"([\d.]+)% of all places hold tokens", out)[1]) > 80


def test_fields_are_set_and_the_parts_of_a_mixture_counted(folder, capsys):
    out = shown(capsys, "--data=mine:mixed", "--show=1", "--experiment.data.sequence_length=32")
    assert "32 places" in out
    counts = {name: int(n.replace(",", "")) for n, name in re.findall(r"([\d,]+) (a|b)\b", out.splitlines()[-1])}
    assert counts["b"] == 3 * counts["a"] > 0


def test_pictures_and_sound_are_saved(folder, capsys):
    from experiments._datasets import digits

    pytest.importorskip("sklearn", reason="needs scikit-learn's digits")
    assert digits().abstract()["image"].shape == (32, 28, 28, 1)
    out = shown(capsys, "--data=experiments._datasets:digits", "--show=6", "--pictures=seen")
    assert "image: seen/image.png" in out
    with Image.open(folder / "seen" / "image.png") as picture:
        pixels = np.asarray(picture.convert("L"), float)
    # six pictures side by side, none of them blank
    columns = np.array_split(pixels[pixels.shape[0] // 3 :], 6, axis=1)
    assert all(column.std() > 30 for column in columns)


def test_what_an_encoder_reads_is_decoded_too(folder, capsys):
    out = shown(capsys, "--data=mine:corrupted", "--show=1")
    assert re.search(r"inputs +int32\[\d+\].*\n    Speech", out)
    inputs, targets = out.split("inputs ")[1], out.split("inputs ")[0]
    assert "⟨278⟩" in inputs.split("inputs_segment_ids")[0]  # where the first span was, and what it was
    assert "⟨278⟩" in targets
    assert re.search(r"segment 1: places 0 to \d+", out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give one of --experiment=NAME and --data=MODULE:FUNCTION"),
        (["--data=mine:sums", "--experiment=moe_tiny"], "give one of"),
        (["--experiment=moe_tny"], "no experiment 'moe_tny'; did you mean 'moe_tiny'"),
        (["--data=mine"], "must be MODULE:FUNCTION"),
        (["--data=nowhere:x"], "ModuleNotFoundError: No module named 'nowhere'"),
        (["--data=mine:nosuch"], "AttributeError: module 'mine' has no attribute 'nosuch'"),
        (["--data=mine:broken"], "--data=mine:broken: RuntimeError: not today"),
        (["--data=mine:nothing"], "returns a int, not data such as Text"),
        (["--data=mine:sums", "--show=-1"], "--show=-1 must be at least 0"),
        (["--data=mine:sums", "--seconds=0"], "--seconds=0 must be a number above 0"),
        (["--data=mine:sums", "--seconds=nan"], "--seconds=nan must be a number above 0"),
        (["--data=experiments._datasets:digits", "--pictures=mine.py"], "cannot write pictures to mine.py"),
        (["--data=mine:sums", "--sow=3"], "unknown argument '--sow=3'; did you mean 'show'"),
        (["convrt"], "unknown argument 'convrt'; did you mean 'convert'"),
        (["--data=mine:sums", "--data.batch_sze=4"], "no field 'batch_sze'; did you mean 'batch_size'"),
        (["--data=mine:sums", "--data.batch_size"], "needs a value"),
        (["--data=mine:sums", "--split=eval"], "none is in the eval split"),
        (["--data=mine:sums", "--data.loss_mask=False"], "set loss_mask=True"),
        (["convert"], "give one of --input|required: --output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(folder, capsys, argv, message):
    assert main(argv) == 2
    _, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert re.search(message.replace("(", r"\("), err), err


def test_the_command_starts_quietly_in_a_process_of_its_own(folder):
    command = [sys.executable, "-m", "axrepro.data", "--data=mine:sums", "--show=1", "--seconds=0.01"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "segment 1" in done.stdout
