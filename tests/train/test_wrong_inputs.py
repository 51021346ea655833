"""Wrong input is one clear line, exit code 2, and nothing is changed on disk.

Each table has a row per fault: what is given, and words that the line must hold.
"""

import io
import json
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from axrepro import launch as launcher

# the code refuses by itself what the annotations would
pytestmark = pytest.mark.usefixtures("unchecked")

TINY = "--experiment=moe_tiny"
DESCRIBE = (TINY, "--mode=describe")
ONE = (*DESCRIBE, "--topology=cpu-1")
V5P = ("--experiment=moe_6b", "--mode=describe", "--topology=v5p-1024")
BLOCK = "--method.model.layers.layer.layers.0"
MOE = "--method.model.layers.layer.layers.1.ffn"
ARGUMENTS = {
    # names and flags
    "unknown experiment": (("--experiment=moe_tinny",), "moe_tinny", "moe_tiny"),
    "unknown file": (("--experiment=moe_dens:tiny",), "moe_dens:tiny", "moe_dense:tiny"),
    "path instead of a name": (("--experiment=experiments/moe_dense.py:tiny",), "moe_dense.py:tiny", "moe_dense:tiny"),
    "file without a function": (("--experiment=moe_dense:",), "'moe_dense:'", "moe_dense:tiny"),
    "no experiment": ((), "--experiment=NAME is missing"),
    "unknown flag": ((TINY, "--workdri=x"), "workdri", "workdir"),
    "single dash": ((TINY, "-train.steps=3"), "-train.steps=3"),
    "positional": ((TINY, "train.steps=1"), "train.steps=1"),
    "override without value": ((TINY, "--train.steps"), "needs a value"),
    "value apart from its field": ((TINY, "--train.steps", "3"), "--train.steps=VALUE"),
    "unknown mode": ((TINY, "--mode=trian"), "trian", "train"),
    "empty workdir": ((TINY, "--workdir="), "--workdir= is empty"),
    "empty topology": ((*DESCRIBE, "--topology="), "--topology= is empty"),
    # fields
    "unknown field": ((TINY, "--train.stepz=3"), "stepz", "steps"),
    "unknown deep field": ((TINY, "--method.model.lyers.times=3"), "lyers", "layers"),
    "empty field": ((TINY, "--train.=3"), "has no field ''", "steps"),
    "element beyond the tuple": ((TINY, "--method.model.layers.layer.layers.2.dropout=0"), "'2'", "0, 1"),
    "private name": ((TINY, "--optimizer.__class__=SGD"), "__class__", "weight_decay"),
    "a group": ((TINY, "--train=3.0", "--train.x=1"), "--train=3.0"),
    "group as value": ((TINY, "--method.model=3"), "method.model", "CausalLM"),
    "value as group": ((TINY, "--train.steps.count=3"), "train.steps is a value"),
    # hardware
    "no devices": ((TINY, "--devices=0"), "--devices=0", "at least 1"),
    "huge number of devices": ((TINY, "--devices=99999999999"), "--devices=99999999999", "--topology"),
    "devices in words": ((TINY, "--devices=two"), "--devices", "'two'"),
    "mesh too large": ((*ONE, "--mesh.fsdp=3", "--mesh.data=1"), "3 devices"),
    "two rests": ((*ONE, "--mesh.fsdp=-1"), "only one axis can be -1"),
    "zero axis": ((*ONE, "--mesh.fsdp=0"), "mesh.fsdp=0"),
    "negative axis": ((*ONE, "--mesh.expert=-2"), "mesh.expert=-2"),
    "unknown topology": (("--experiment=moe_29b", "--mode=describe", "--topology=v9-8"), "v9-8", "v5p"),
    "odd topology": (("--experiment=moe_29b", "--mode=describe", "--topology=v5p-9"), "v5p-9", "multiple of 2"),
    "no slice": (("--experiment=moe_29b", "--mode=describe", "--topology=0xv5p-8"), "0xv5p-8", "at least 1"),
    "slices over mesh": (("--experiment=moe_29b", "--mode=describe", "--topology=2xv5p-512"), "set mesh.data=2"),
    "topology while training": ((TINY, "--topology=v5p-8"), "--mode=describe"),
    "topology while evaluating": ((TINY, "--topology=v5p-8", "--mode=eval"), "--mode=describe"),
    "batch over mesh": ((*DESCRIBE, "--topology=cpu-8", "--data.batch_size=12"), "12", "batch"),
    "microbatch over mesh": (
        (*DESCRIBE, "--topology=cpu-8", "--train.grad_accumulation=2"),
        "train.grad_accumulation=2",
        "4 rows",
    ),
    "experts over mesh": (
        ("--experiment=moe_29b", "--mode=describe", "--topology=v5p-1024", "--mesh.fsdp=4", "--mesh.expert=128"),
        "expert",
        "64",
    ),
    "process flags": ((TINY, "--coordinator=localhost:1"), "--num_processes"),
    "process id": ((TINY, "--coordinator=localhost:1", "--num_processes=2", "--process_id=2"), "--process_id=2"),
    "negative process id": ((TINY, "--process_id=-1"), "--process_id=-1"),
    # modes
    "explain while training": ((TINY, "--explain=train.steps"), "--explain", "--mode=describe"),
    "diff while evaluating": (("--experiment=moe_6b", "--mode=eval", "--diff=moe_13b"), "--diff", "--mode=describe"),
    "explain and diff": (
        ("--experiment=moe_6b", "--mode=describe", "--diff=moe_13b", "--explain=train"),
        "--explain",
        "--diff",
    ),
    "explain unknown": ((*V5P, "--explain=experiment.train.stepz"), "stepz", "steps"),
    "explain below a value": ((*V5P, "--explain=train.steps.x"), "train.steps is a value"),
    "explain with a wrong override": ((*V5P, "--explain=train", "--trian.steps=1"), "trian"),
    "diff with an unknown experiment": ((*V5P, "--diff=moe_7b"), "moe_7b", "moe_6b"),
    "diff with an override for one": (
        (*V5P, "--diff=dense_6b", "--method.model.layers.layer.layers.3.ffn.num_experts=128"),
        "dense_6b, of the two",
        "'layers'",
    ),
    "diff on a topology for one": ((*V5P, "--diff=moe_tiny"), "moe_tiny, of the two", "batch"),
    # fields that must fit each other
    "accumulation": ((TINY, "--train.grad_accumulation=3"), "train.grad_accumulation=3"),
    "heads": ((*ONE, "--method.model.dim=130"), "130", "num_heads"),
    "odd head": ((*DESCRIBE, "--method.model.dim=100"), "head_dim 25"),
    "top-k": ((*ONE, f"{MOE}.router.k=9"), "k=9"),
    "buffer without dropless": ((*ONE, f"{MOE}.buffer_factor=1.5"), "buffer_factor: 1.5 has no effect"),
    "product without dropless": (
        (*ONE, f"{MOE}.implementation=ragged_dot"),
        "implementation: 'ragged_dot' has no effect",
    ),
    "conversion of another kind": (
        (TINY, "--train.conversion.reinitialise=0.5"),
        "SamePaths (at train.conversion)",
        "'reinitialise'",
        "file",
    ),
    "group size": ((*ONE, f"{MOE}.group_size=48"), "group_size=48", "256"),
    "warm-up beyond the run": ((*ONE, "--optimizer.learning_rate.warmup=2000"), "warmup=2000", "train.steps"),
    "kernel without its shapes": ((*ONE, f"{BLOCK}.attention.implementation=splash"), "splash", "'auto'"),
    "remat": ((TINY, "--train.remat=ful"), "ful", "full"),
    "remat of nothing": ((*ONE, "--train.remat=save:querry"), "querry", "train.remat"),
    "rule for no mesh axis": ((*ONE, "--rules.table=(('batch',('dataa',)),)"), "dataa", "data"),
    "table without a rule": ((*ONE, "--rules.table=(('batch',('data',)),)"), "vocab"),
    "raw of no average": ((TINY, "--eval.raw=true"), "eval.raw=True", "average"),
    "scales as no pairs": (
        (TINY, "--optimizer.update_scale=**/ffn/*,0.5"),
        "optimizer.update_scale='**/ffn/*,0.5'",
        "tuple[tuple[str, float], ...]",
    ),
    "pattern of no parameter": ((*ONE, "--optimizer.update_scale=(('nothing/*',0.5),)"), "nothing/*"),
    "allowed finding of no kind": ((*ONE, "--experiment.allow=nonsense"), "nonsense", "mesh-rule"),
    "vocabulary": ((TINY, "--method.model.vocab_size=200"), "vocab_size=200", "259"),
    "compiler option": (
        (TINY, "--train.compiler_options=(('xla_nothing','1'),)"),
        "train.compiler_options",
        "xla_nothing",
    ),
    "value of a compiler option": (
        (TINY, "--train.compiler_options=(('xla_cpu_enable_fast_math','maybe'),)"),
        "train.compiler_options",
        "maybe",
    ),
    "no cache folder": ((TINY, "--train.compilation_cache=/proc/nothing"), "train.compilation_cache", "/proc/nothing"),
}

# field, value that it cannot have; the line begins with the field
RANGES = [
    *[("train.steps", value) for value in ("0", "-1", "1e3", "1e999", "1.0", "true", "", "many", "1__0", "2147483648")],
    *[("train.seed", value) for value in ("-1", "4294967296", "nan")],
    *[("train.log_every", "0"), ("train.max_skips", "0"), ("train.grad_accumulation", "0")],
    *[("train.dtype", "float8"), ("train.not_finite", "ignore"), ("train.compiler_options", "a")],
    *[("checkpoint.every", "0"), ("checkpoint.keep", "0"), ("checkpoint.keep_every", "-5")],
    *[("eval.every", "0"), ("eval.batches", "0")],
    *[("data.batch_size", value) for value in ("0", "-8", "99999999999999")],
    *[("data.sequence_length", value) for value in ("0", "-1", "99999999999999")],
    *[("data.source.holdout", "1"), ("data.source.holdout", "-1"), ("data.shuffle", "maybe")],
    *[("optimizer.b1", "1"), ("optimizer.b2", "-0.1"), ("optimizer.eps", "0"), ("optimizer.weight_decay", "-1")],
    *[("optimizer.clip", "0"), ("optimizer.clip", "nan"), ("optimizer.moment_dtype", "float16")],
    *[("optimizer.learning_rate.peak", value) for value in ("-1", "nan", "inf", "1e999", "")],
    *[("optimizer.learning_rate.floor", "1.5"), ("optimizer.learning_rate.warmup", "-1")],
    *[("method.z_weight", "-1"), ("method.z_weight", "inf"), ("method.chunk", "0")],
    *[("method.model.vocab_size", "0"), ("method.model.dim", "0"), ("method.model.embed_scale", "0")],
    *[("method.model.logit_cap", "0"), ("method.model.norm.eps", "-1"), ("method.model.norm.eps", "nan")],
    *[("method.model.layers.times", "0"), ("method.model.layers.unroll", "0")],
    *[(f"{BLOCK}.dropout", value) for value in ("-0.1", "1", "nan")],
    *[(f"{BLOCK}.attention.num_heads", "0"), (f"{BLOCK}.attention.num_kv_heads", "0")],
    *[(f"{BLOCK}.attention.num_kv_heads", "3"), (f"{BLOCK}.attention.head_dim", "-2")],
    *[(f"{BLOCK}.attention.mask.window", "0"), (f"{BLOCK}.attention.logit_cap", "-1")],
    *[(f"{BLOCK}.attention.rope.base", value) for value in ("0", "-1", "nan")],
    *[(f"{BLOCK}.attention.rope.fraction", value) for value in ("0", "1.5", "nan")],
    *[(f"{BLOCK}.ffn.hidden", "0"), (f"{BLOCK}.ffn.act", "swish"), (f"{BLOCK}.attention.implementation", "flash")],
    *[(f"{MOE}.capacity_factor", value) for value in ("0", "-1", "nan", "inf")],
    *[(f"{MOE}.eval_capacity_factor", "0"), (f"{MOE}.group_size", "0"), (f"{MOE}.num_experts", "0")],
    *[(f"{MOE}.router.k", "0"), (f"{MOE}.router.losses.balance", "-1"), (f"{MOE}.router.losses.z", "nan")],
    *[(f"{MOE}.dispatch", "droples"), (f"{MOE}.router.scores", "sigmoyd"), (f"{MOE}.shared_gate", "true")],
]


@pytest.fixture(autouse=True)
def same_process(monkeypatch):
    """The launcher runs here, on the devices that the tests have set up."""
    monkeypatch.setattr(launcher, "set_up_platform", lambda args: None)


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the launcher, and holds that it refuses in one line with these words and that no file changed."""

    def check(arguments, words) -> str:
        before = _files(tmp_path)
        code = launcher.main(list(arguments))
        message = capsys.readouterr().err
        assert code == 2, message
        assert message.startswith("axrepro: error: ")
        assert message.count("\n") == 1
        assert all(word in message for word in words), message
        assert _files(tmp_path) == before
        return message

    return check


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_one_line_that_names_it(name, refused, tmp_path, monkeypatch):
    arguments, *words = ARGUMENTS[name]
    monkeypatch.chdir(tmp_path)
    refused(arguments, words)


@pytest.mark.parametrize(("field", "value"), RANGES)
def test_a_value_out_of_range_is_one_line_that_begins_with_its_field(field, value, refused):
    field = field.removeprefix("--")
    message = refused((*DESCRIBE, f"--{field}={value}"), ("take",))
    assert message.startswith(f"axrepro: error: {field}=")


# Experiment files: their text, or what makes them; the experiment that is asked for, and words
HEAD = "from axrepro.train.experiment import Experiment\n"
FAILS = HEAD + "def f() -> Experiment:\n    {}\n"
FILES = {
    "syntax": ({"a.py": "x = 1\ndef f( -> :\n"}, "f", "a.py", "line 2"),
    "null bytes": ({"a.py": "x = 1\0"}, "f", "a.py", "null bytes"),
    "no UTF-8": ({"a.py": b"\xff\xfe"}, "f", "a.py", "utf-8"),
    "a folder": ({"a.py/b": ""}, "f", "a.py", "directory"),
    "a link to nothing": ({"a.py": Path("/nowhere.py")}, "f", "a.py", "No such file"),
    "missing import": ({"a.py": "import nothing_like_it\n" + FAILS.format("pass")}, "f", "a.py:1", "nothing_like_it"),
    "missing name": ({"a.py": FAILS.format("return nothing_like_it")}, "f", "a.py:3", "nothing_like_it"),
    "unknown keyword": ({"a.py": FAILS.format("return Experiment(stepz=3)")}, "f", "a.py:3", "TypeError"),
    "error of its own": ({"a.py": FAILS.format("raise KeyError('dim')")}, "f", "a.py:3", "KeyError", "dim"),
    "exit": ({"a.py": FAILS.format("raise SystemExit(3)")}, "f", "a.py:3", "SystemExit"),
    "value out of range": (
        {"a.py": FAILS.format("from axrepro.train.experiment import Train; return Train(steps=0)")},
        "f",
        "a.py:3",
        "Train.steps=0",
    ),
    "returns nothing": ({"a.py": FAILS.format("pass")}, "f", "a.py", "f() returns a NoneType, not an Experiment"),
    "name with a dot": ({"a.b.py": FAILS.format("pass")}, "f", "a.b.py", "ModuleNotFoundError"),
    "fault of the folder": ({"b/__init__.py": "1 / 0", "b/a.py": FAILS.format("pass")}, "f", "b/a.py", "division"),
    "in two files": ({"a.py": FAILS.format("pass"), "b.py": FAILS.format("pass")}, "f", "a:f, b:f"),
    "twice in a file": ({"a.py": FAILS.format("pass") * 2}, "f", "2 times", "a.py"),
    "no file": ({}, "f", "no experiment 'f'"),
}


@contextmanager
def _project(folder: Path):
    """The `experiments` in this folder, instead of this repository's."""
    is_ours = lambda name: name.split(".")[0] == "experiments"
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in filter(is_ours, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(before)


@pytest.mark.parametrize("name", FILES)
def test_a_broken_experiment_file_is_one_line_that_names_it(name, refused, tmp_path, monkeypatch):
    files, experiment, *words = FILES[name]
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for file, content in ({"__init__.py": ""} | files).items():
        path = tmp_path / "experiments" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with _project(tmp_path):
        refused((f"--experiment={experiment}", "--mode=describe"), words)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with documents, and the experiments of `project/`."""
    monkeypatch.chdir(tmp_path)
    _write_data(tmp_path)
    with _project(Path(__file__).parent / "project"):
        yield tmp_path


def _write_data(folder: Path):
    data = folder / "data"
    data.mkdir()
    for i in range(20):
        (data / f"{i}.txt").write_text(f"the text of document {i}, " * 9)
    (data / "a.jsonl").write_text("\n".join(json.dumps({"text": f"the text of line {i}, " * 9}) for i in range(50)))


def _each_text(content: bytes):
    return lambda data: [path.write_bytes(content) for path in data.glob("*.txt")]


def _vocabulary(cut: int | None = None, **options):
    """Trains one beside the data; `cut` ends its file early."""

    def write(data: Path):
        import sentencepiece

        out, lines = io.BytesIO(), (f"the text of document {i * 7}" for i in range(300))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=out, vocab_size=40, hard_vocab_limit=False, minloglevel=2, **options
        )
        (data / "vocabulary.model").write_bytes(out.getvalue()[:cut])

    return write


# what is done to data/, the experiment and overrides, and words
DATA = {
    "no match": (None, ("tiny", "--data.source.pattern=data/*.md"), "data/*.md"),
    "empty pattern": (None, ("tiny", "--data.source.pattern="), "no file matches ''"),
    "pattern of a folder": (None, ("tiny", "--data.source.pattern=data"), "'data'"),
    "folder missing": (lambda data: shutil.rmtree(data), ("tiny",), "data/*.txt", " in /"),
    "all files empty": (_each_text(b""), ("tiny",), "data/*.txt", "are empty"),
    "a link to nothing": (lambda data: (data / "x.txt").symlink_to("/nowhere"), ("tiny",), "data/x.txt"),
    "unreadable": (lambda data: (data / "x.txt").symlink_to("x.txt"), ("tiny",), "cannot read data/x.txt"),
    "broken gz": (
        lambda data: (data / "x.txt.gz").write_bytes(b"no gzip"),
        ("tiny", "--data.source.pattern=data/*.txt*"),
        "data/x.txt.gz",
    ),
    "eval files are all files": (None, ("tiny", "--data.source.eval_pattern=data/*.txt"), "data/*.txt", "no documents"),
    "eval files missing": (None, ("tiny", "--data.source.eval_pattern=data/*.md"), "data/*.md"),
    "nothing held out": (None, ("tiny", "--data.source.holdout=1000000"), "holdout=1000000", "eval_pattern"),
    "no holdout": (None, ("tiny", "--data.source.holdout=0"), "holdout=0", "eval_pattern"),
    "empty separator": (None, ("tiny", "--data.source.separator="), "data.source.separator=''"),
    "cut JSON": (lambda data: (data / "b.jsonl").write_text('{"text": "a"}\n{"te'), ("json_lines",), "data/b.jsonl:2"),
    "JSON list": (lambda data: (data / "b.jsonl").write_text("[1]"), ("json_lines",), "data/b.jsonl:1", "list"),
    "deep JSON": (lambda data: (data / "b.jsonl").write_text("[" * 10**5), ("json_lines",), "data/b.jsonl:1"),
    "binary JSON": (lambda data: (data / "b.jsonl").write_bytes(b"\xff\xfe\0"), ("json_lines",), "data/b.jsonl:1"),
    "JSON number": (lambda data: (data / "b.jsonl").write_text('{"text": 3}'), ("json_lines",), "data/b.jsonl:1", "3"),
    "JSON field": (None, ("json_lines", "--data.field=txt"), "data/a.jsonl:1", "'txt'", "'text'"),
    "no vocabulary": (None, ("pieces",), "data/vocabulary.model"),
    "empty vocabulary": (lambda data: (data / "vocabulary.model").touch(), ("pieces",), "data/vocabulary.model"),
    "cut vocabulary": (_vocabulary(cut=-50), ("pieces",), "data/vocabulary.model is no SentencePiece model"),
    "vocabulary without end": (_vocabulary(eos_id=-1), ("pieces",), "data/vocabulary.model", "eos_id"),
    "vocabulary too large": (_vocabulary(), ("pieces", "--method.model.vocab_size=9"), "method.model.vocab_size=9"),
    "no UTF-8": (lambda data: (_vocabulary()(data), _each_text(b"\xff")(data)), ("pieces",), ".txt is not UTF-8"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_cannot_be_used_stops_the_run_before_it_begins(name, project, refused):
    from axrepro.data import vocabulary

    vocabulary._processor.cache_clear()  # every row has another file under the same name
    change, (experiment, *overrides), *words = DATA[name]
    if change is not None:
        change(project / "data")
    refused((f"--experiment=small:{experiment}", "--workdir=run", *overrides), words)


# how the run is addressed, flags, and words
WORKDIRS = {
    "a file": ("data/1.txt", (), "data/1.txt", "choose another"),
    "in a file": ("data/1.txt/run", (), "data/1.txt/run", "Not a directory"),
    "a device": ("/dev/null", (), "/dev/null"),
    "below /proc": ("/proc/nothing/x", (), "/proc/nothing/x"),
    "below /sys": ("/sys/x", (), "/sys/x"),
    "name too long": ("x" * 300, (), "File name too long"),
    "null byte": ("a\0b", (), "null byte"),
    "home of nobody": ("~nobody-has-this-name/x", (), "~nobody-has-this-name"),
    "unknown bucket": ("ftp://bucket/run", (), "ftp://bucket/run", "gs://"),
    "capital bucket": ("GS://bucket/run", (), "GS://bucket/run", "gs://"),
    "bucket with one slash": ("gs:/bucket/run", (), "gs:/bucket/run", "gs://"),
    "nothing to evaluate": ("run", ("--mode=eval",), "no checkpoint", "run/checkpoints"),
    "evaluate a file": ("data/1.txt", ("--mode=eval",), "no checkpoint", "data/1.txt"),
}


@pytest.mark.parametrize("name", WORKDIRS)
def test_a_workdir_that_cannot_be_used_is_named(name, project, refused):
    workdir, flags, *words = WORKDIRS[name]
    refused(("--experiment=small:tiny", f"--workdir={workdir}", *flags), words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of `small:tiny`, with checkpoints 2 and 3."""
    folder = tmp_path_factory.mktemp("trained")
    _write_data(folder)
    with pytest.MonkeyPatch.context() as patch, _project(Path(__file__).parent / "project"):
        patch.chdir(folder)
        patch.setattr(launcher, "set_up_platform", lambda args: None)
        assert launcher.main(["--experiment=small:tiny", "--workdir=run"]) == 0
    return folder / "run"


def _largest(folder: Path) -> Path:
    return max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)


def _cut(run):
    part = _largest(run / "checkpoints/3/params")
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def _remove(path):
    return lambda run: shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()


def _write(path, content):
    """Writes a file in place of what is there."""

    def change(run):
        _remove(path)(run)
        (run / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _folder(path):
    return lambda run: (_remove(path)(run), (run / path).mkdir())


_POSITION = "checkpoints/3/data/metadata"
_AWAY = ("checkpoints/3", "move that folder away", "step 2")
# what is done to the run, the experiment and overrides of the next start, and words
DAMAGE = {
    "cut short": (_cut, (), *_AWAY),
    "params lost": (_remove("checkpoints/3/params"), (), "params", *_AWAY),
    "optimizer state lost": (_remove("checkpoints/3/opt_state"), (), "opt_state", *_AWAY),
    "step lost": (_remove("checkpoints/3/train"), (), "train", *_AWAY),
    "position lost": (_remove("checkpoints/3/data"), (), "data", *_AWAY),
    "listing lost": (_remove("checkpoints/3/params/_METADATA"), (), "params", *_AWAY),
    "listing damaged": (_write("checkpoints/3/params/_METADATA", "{"), (), *_AWAY),
    "position damaged": (_write(_POSITION, "{"), (), *_AWAY),
    "position of other data": (_write(_POSITION, '{"file": 3}'), (), "checkpoints/3", "data position", "--workdir"),
    "position negative": (_write(_POSITION, '{"next_example": -5}'), (), "checkpoints/3", "-5"),
    "position beyond all": (_write(_POSITION, '{"next_example": 9223372036854775807}'), (), "checkpoints/3"),
    "of a newer version": (
        lambda run: shutil.copytree(run / "checkpoints/3/params", run / "checkpoints/3/teacher"),
        (),
        "checkpoints/3",
        "'teacher'",
        "--workdir",
    ),
    "renamed": (
        lambda run: (run / "checkpoints/3").rename(run / "checkpoints/4"),
        (),
        "checkpoints/4",
        "it holds step 3",
        "step 2",
    ),
    "empty": (lambda run: (run / "checkpoints/4").mkdir(), (), "checkpoints/4", "step 3"),
    "all in one file": (_write("checkpoints", "x"), (), "checkpoints", "is a file"),
    "another run": (_write("config.json", '{"experiment": "another"}'), (), "another", "--workdir"),
    "another optimizer": (lambda run: None, ("small:sgd",), "'small:tiny'", "'sgd'", "--workdir"),
    "config no JSON": (_write("config.json", "{"), (), "config.json"),
    "config of something else": (_write("config.json", "[1]"), (), "config.json", "no record of a run"),
    "config binary": (_write("config.json", b"\xff\xfe"), (), "config.json"),
    "config a folder": (_folder("config.json"), (), "config.json"),
    "metrics damaged": (_write("metrics.jsonl", '{"step": 1\n{"step": 2}\n'), (), "metrics.jsonl:1", "away"),
    "metrics of something else": (_write("metrics.jsonl", '{"step": 1}\n[2]\n'), (), "metrics.jsonl:2", "away"),
    "metrics without steps": (_write("metrics.jsonl", '{"loss": 1.0}\n'), (), "metrics.jsonl:1", "away"),
    "metrics binary": (_write("metrics.jsonl", b"\xff\xfe\n"), (), "metrics.jsonl", "away"),
    "metrics a folder": (_folder("metrics.jsonl"), (), "metrics.jsonl", "away"),
    "events a file": (_write("events", "x"), (), "events"),
    "another width": (lambda run: None, ("small:tiny", "--method.model.dim=16"), "checkpoints/3", "shape", "--workdir"),
    "another head": (
        lambda run: None,
        ("small:tiny", "--method.model.tied=true"),
        "checkpoints/3",
        "head",
        "--workdir",
    ),
    "another vocabulary": (
        lambda run: None,
        ("small:tiny", "--method.model.vocab_size=300"),
        "checkpoints/3",
        "(264, 8) there and (300, 8) here",
    ),
    "another schedule of the state": (
        lambda run: None,
        ("small:tiny", "--method.model.layers.times=2"),
        "checkpoints/3",
        "shape",
    ),
    "fewer steps": (lambda run: None, ("small:tiny", "--train.steps=1"), "step 3", "train.steps=1"),
    "evaluated with another width": (
        lambda run: None,
        ("small:tiny", "--mode=eval", "--method.model.dim=16"),
        "checkpoints/3",
        "shape",
    ),
    "evaluated without params": (_remove("checkpoints/3/params"), ("small:tiny", "--mode=eval"), "params", *_AWAY),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_that_does_not_fit_or_is_damaged_stays_as_it_is(name, trained, project, refused):
    change, (experiment, *overrides), *words = DAMAGE[name][0], DAMAGE[name][1] or ("small:tiny",), *DAMAGE[name][2:]
    shutil.copytree(trained, project / "run")
    change(project / "run")
    refused((f"--experiment={experiment}", "--workdir=run", "--train.steps=6", *overrides), words)


@pytest.mark.parametrize("room", [0, 300])
def test_a_full_disk_is_told_and_harms_nothing(room, trained, project, refused):
    shutil.copytree(trained, project / "run")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        code = launcher.main(["--experiment=small:tiny", "--workdir=run", "--train.steps=6"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2
    for path, content in _files(trained).items():
        assert (project / "run" / path).read_bytes() == content


# odd but right: arguments, and what the output holds
RIGHT = {
    "underscores": (("--train.steps=1_000",), "steps: 1000"),
    "spaces around a number": (("--train.steps= 7 ",), "steps: 7"),
    "the root of a path": (("--experiment.train.steps=7",), "steps: 7"),
    "the last of two values": (("--train.steps=8", "--train.steps=7"), "steps: 7"),
    "a tuple": (("--data.source.pattern=('a b/*.txt', 'ü/*')",), "pattern: ('a b/*.txt', 'ü/*')"),
    "an equals sign": (("--data.source.pattern=a=b",), "pattern: 'a=b'"),
    "pairs": (("--optimizer.update_scale=(('**/ffn/*', 0.5),)",), "update_scale: (('**/ffn/*', 0.5),)"),
    "none": (("--optimizer.clip=None",), "clip: None"),
    "an int for a float": (("--optimizer.weight_decay=1",), "weight_decay: 1.0"),
    "an exponent": (("--optimizer.eps=1e-6",), "eps: 1e-06"),
    "an upper-case bool": (("--data.shuffle=FALSE",), "shuffle: False"),
    "numbers of 2**32": (("--train.seed=4294967295",), "seed: 4294967295"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_odd_but_right_arguments_are_taken(name, project, capsys):
    arguments, shown = RIGHT[name]
    assert launcher.main(["--experiment=small:tiny", "--mode=describe", *arguments]) == 0
    out, err = capsys.readouterr()
    assert shown in out
    assert err == ""


@pytest.mark.parametrize(
    "workdir", ["run/", "./a/../run", "a run with spaces", "läuft/ランニング", "run:1", "{tmp}/run"]
)
def test_odd_but_right_workdirs_are_taken(workdir, trained, project, capsys):
    workdir = workdir.format(tmp=project)
    (project / "a").mkdir()
    shutil.copytree(trained, project / workdir)
    assert launcher.main(["--experiment=small:tiny", f"--workdir={workdir}"]) == 0
    assert "already complete at step 3" in capsys.readouterr().out


def test_an_experiment_is_addressed_by_its_folder_and_the_exact_name_wins(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    shutil.copytree(Path(__file__).parent / "project/experiments", tmp_path / "experiments")
    shutil.copytree(Path(__file__).parent / "project/experiments", tmp_path / "experiments/text-2")
    with _project(tmp_path):
        for name in ("text-2/small:tiny", "small:tiny"):
            assert launcher.main([f"--experiment={name}", "--mode=describe"]) == 0
            assert capsys.readouterr().out.startswith(name)
