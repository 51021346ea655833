"""Streams of SeqIO's tasks, against SeqIO itself and against plain loops over the files."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from axrepro.core import Context, MeshShape, UserError, make_mesh
from axrepro.core.param import init_params
from axrepro.data import Bytes, SentencePiece
from axrepro.data.seqio import SeqIO, SeqIOVocabulary, seqio_metrics
from axrepro.data.sources.tfds import Tfds
from axrepro.decode.sample import sample
from axrepro.models.causal_lm import llama

DATA = Path(os.environ.get("AXREPRO_DATA", Path(__file__).resolve().parents[2].parent / "shared/data"))
FILES, LINES, HELD_OUT = 3, 12, 7  # train files, lines in each, lines of the validation file

MODULE = '''
import json, os
import numpy as np
import seqio
import tensorflow as tf

FOLDER = os.environ["AXREPRO_TEST_TASKS"]
BYTES = seqio.ByteVocabulary()
PAIR = {"inputs": seqio.Feature(BYTES), "targets": seqio.Feature(BYTES)}
LINES = seqio.TextLineDataSource({"train": f"{FOLDER}/train*.tsv", "validation": f"{FOLDER}/validation.tsv"})

def split(dataset):
    def one(line):
        parts = tf.strings.split(line, "\\t")
        return {"inputs": parts[0], "targets": parts[1]}
    return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)

def noise(dataset):
    """Draws without a seed, in parallel."""
    def one(example):
        drawn = tf.random.uniform([4], 3, 200, tf.int32)
        return {"targets": tf.concat([example["targets"], drawn], 0)}
    return dataset.map(one, num_parallel_calls=4)

@seqio.map_over_dataset(num_seeds=1)
def seeded_noise(example, seed):
    drawn = tf.random.stateless_uniform([4], seed, 3, 200, tf.int32)
    return {"targets": tf.concat([example["targets"], drawn], 0)}

def fixed(dataset):
    return dataset.map(lambda line: {"targets": tf.ones([4], tf.int32), "line": line})

def accuracy(targets, predictions):
    return {"accuracy": float(np.mean([t == p for t, p in zip(targets, predictions)]))}

def mean_score(targets, scores):
    return {"score": float(np.mean(scores)), "characters": sum(map(len, targets))}

def upper(answer, example, is_target):
    return answer.upper()

def number(answer, example, is_target):
    return answer.rpartition("#### ")[2].strip()

def gsm8k(split, shuffle_files, seed=None):
    with open(f"{os.environ['AXREPRO_TEST_DATA']}/gsm8k/{split}.jsonl") as file:
        records = [json.loads(line) for line in file]
    columns = {"inputs": [r["question"] for r in records], "targets": [r["answer"] for r in records]}
    dataset = tf.data.Dataset.from_tensor_slices(columns)
    return dataset.shuffle(len(records), seed=seed) if shuffle_files else dataset

TARGETS = {"targets": seqio.Feature(BYTES)}
NO_END = {"targets": seqio.Feature(BYTES, add_eos=False)}
TOKENS = [split, seqio.preprocessors.tokenize]
END = [seqio.preprocessors.append_eos]

def add(name, source, features, *preprocessors, **more):
    seqio.TaskRegistry.add(name, source, output_features=features, preprocessors=preprocessors, **more)

add("pairs", LINES, PAIR, *TOKENS, *END)
add("lines", LINES, TARGETS, *TOKENS, *END)
add("noisy", LINES, NO_END, *TOKENS, noise)
add("seeded", LINES, NO_END, *TOKENS, seeded_noise)
add("fixed", LINES, TARGETS, fixed)
add("cached", LINES, TARGETS, *TOKENS, seqio.CacheDatasetPlaceholder(), *END)
add("measured", LINES, PAIR, *TOKENS, *END, postprocess_fn=upper, metric_fns=[accuracy, mean_score])
add("math", seqio.FunctionDataSource(gsm8k, ["train", "test"]), PAIR, seqio.preprocessors.tokenize, *END,
    postprocess_fn=number, metric_fns=[accuracy])
add("shakespeare",
    seqio.TextLineDataSource({"train": f"{os.environ['AXREPRO_TEST_DATA']}/tinyshakespeare/input.txt"}), TARGETS,
    lambda dataset: dataset.map(lambda line: {"targets": line}), seqio.preprocessors.tokenize, *END)
seqio.MixtureRegistry.add("mixed", [("lines", 3.0), ("seeded", 1.0)])
'''


def pairs_of(path: Path) -> list[tuple[str, str]]:
    return [tuple(line.split("\t")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files of the tasks, whose module can be imported as `axrepro_test_tasks`."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklmnopqrstuvwxyz é")

    def write(name: str, count: int) -> None:
        rows = [
            f"{name} {i}\t" + "".join(rng.choice(letters, rng.integers(1, 40))).strip() + f" {name} {i}"
            for i in range(count)
        ]
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n")

    for number in range(FILES):
        write(f"train{number}", LINES)
    write("validation", HELD_OUT)
    (folder / "axrepro_test_tasks.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXREPRO_TEST_TASKS", str(folder))
        patch.setenv("AXREPRO_TEST_DATA", str(DATA))
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture
def stream(folder):
    """Makes a stream of unpacked lines, with changes."""

    def make(task="lines", **changes) -> SeqIO:
        fields = {"batch_size": 4, "task_feature_lengths": (("targets", 64),), "pack": False}
        return SeqIO(**fields | changes, task=task, modules=("axrepro_test_tasks",))

    return make


def one_device():
    return make_mesh(MeshShape(), jax.devices()[:1])


def texts(examples) -> list[str]:
    return [Bytes().decode(example["targets"]) for example in examples]


# name in SeqIO's answer, by ours
DECODER = {"tokens": "decoder_input_tokens", "targets": "decoder_target_tokens", "loss_mask": "decoder_loss_weights"}
PACKED = {"segment_ids": "decoder_segment_ids", "positions": "decoder_positions"}
ENCODER = {"encoder_tokens": "encoder_input_tokens"}
ENCODER_PACKED = {"encoder_segment_ids": "encoder_segment_ids", "encoder_positions": "encoder_positions"}
PREFIX = {"prefix": "decoder_causal_attention"}


@pytest.mark.parametrize(
    ("converter", "pack", "names"),
    [
        ("LMFeatureConverter", True, DECODER | PACKED),
        ("PrefixLMFeatureConverter", False, DECODER | PREFIX),
        ("EncDecFeatureConverter", True, DECODER | PACKED | ENCODER | ENCODER_PACKED),
        ("EncDecFeatureConverter", False, DECODER | ENCODER),
    ],
)
def test_examples_are_those_of_seqio_by_our_names(stream, converter, pack, names):
    lengths = {"targets": 96} if converter == "LMFeatureConverter" else {"inputs": 48, "targets": 96}
    task = "lines" if converter == "LMFeatureConverter" else "pairs"
    data = stream(task, converter=converter, pack=pack, task_feature_lengths=tuple(lengths.items()), batch_size=1)
    ours = list(data.examples("eval", 0, 0, 0))

    import seqio

    inner = getattr(seqio, converter)(pack=pack)
    theirs = list(seqio.get_dataset(task, lengths, inner, "validation", shuffle=False).as_numpy_iterator())
    assert len(ours) == len(theirs) > 1
    for our, their in zip(ours, theirs, strict=True):
        assert their.keys() == set(names.values())
        for name, seqio_name in names.items():
            np.testing.assert_array_equal(our[name], their[seqio_name], err_msg=name)
        for sequence, prefix in (("targets", ""), ("encoder_tokens", "encoder_")):
            if not pack and sequence in our:
                real = len(np.trim_zeros(our[sequence], "b"))
                padding = len(our[sequence]) - real
                assert our[f"{prefix}segment_ids"].tolist() == [1] * real + [0] * padding
                assert our[f"{prefix}positions"].tolist() == [*range(real), *[0] * padding]
    shapes = {name: (array.shape[1:], array.dtype) for name, array in data.abstract().items()}
    assert shapes == {name: (value.shape, value.dtype) for name, value in ours[0].items()}
    types = {"loss_mask": np.float32, "prefix": np.bool_}
    assert all(dtype == types.get(name, np.int32) for name, (_, dtype) in shapes.items())


def test_a_converter_may_be_a_function(stream):
    def everywhere(pack):
        import seqio

        return seqio.PrefixLMFeatureConverter(pack=pack, loss_on_targets_only=False)

    lengths = (("inputs", 48), ("targets", 96))
    example = next(stream("pairs", converter=everywhere, task_feature_lengths=lengths).examples("eval", 0, 0, 0))
    np.testing.assert_array_equal(example["loss_mask"], example["segment_ids"])


def test_examples_that_need_no_conversion_lose_their_strings_alone(stream):
    data = stream("fixed", converter="PassThroughFeatureConverter", task_feature_lengths=(("targets", 4),))
    batch = next(data.batches("train", 0, one_device()))
    assert batch.keys() == {"targets", "segment_ids", "positions"}
    assert batch["targets"].tolist() == [[1] * 4] * 4
    with pytest.raises(UserError, match="promised"):
        next(dataclasses.replace(data, task_feature_lengths=(("targets", 5),)).batches("train", 0, one_device()))


def test_every_epoch_has_every_line_once_in_an_order_of_its_own(stream, folder):
    lines = sorted(text for path in folder.glob("train*.tsv") for _, text in pairs_of(path))
    epochs = [texts(stream().examples("train", 7, epoch, 0)) for epoch in range(3)]
    assert all(sorted(epoch) == lines for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert texts(stream().examples("train", 7, 1, 0)) == epochs[1]
    assert texts(stream().examples("train", 8, 1, 0)) != epochs[1]


@pytest.mark.parametrize("shards", [3, 4])  # as many as there are files, and more, when each takes every fourth line
def test_the_shards_of_an_epoch_share_its_lines(stream, folder, shards):
    data = stream(shards=shards, batch_size=12)
    parts = [texts(data.examples("train", 0, 1, shard)) for shard in range(shards)]
    assert sorted(text for part in parts for text in part) == sorted(
        text for path in folder.glob("train*.tsv") for _, text in pairs_of(path)
    )
    assert all(len(part) == FILES * LINES // shards for part in parts)


def test_resuming_at_any_batch_gives_the_batches_of_an_uninterrupted_run(stream):
    data = stream("seeded", shards=2, batch_size=8)
    run, seen = data.batches("train", 3, make_mesh(MeshShape())), []
    for _ in range(6):  # an epoch has 4.5 batches
        seen.append((json.loads(json.dumps(run.position())), jax.device_get(next(run))))
    assert len({batch["targets"].tobytes() for _, batch in seen}) == 6
    for start in (1, 5):
        resumed = data.batches("train", 3, one_device())
        resumed.seek(seen[start][0])
        for name, value in next(resumed).items():
            np.testing.assert_array_equal(value, seen[start][1][name], err_msg=name)


def first(data: SeqIO, count: int, epoch: int = 0) -> np.ndarray:
    """The first targets of an epoch."""
    return np.stack([example["targets"] for example in itertools.islice(data.examples("train", 0, epoch, 0), count)])


def test_preprocessors_that_draw_without_a_seed_draw_the_same_again(stream):
    one = first(stream("noisy"), FILES * LINES)
    np.testing.assert_array_equal(first(stream("noisy"), FILES * LINES), one)
    assert not np.array_equal(first(stream("noisy"), FILES * LINES, epoch=1), one)


def test_a_mixture_goes_on_for_ever_at_its_rates_and_is_the_same_again(stream):
    count = 400
    one = first(stream("mixed"), count)
    np.testing.assert_array_equal(first(stream("mixed"), 50), one[:50])
    plain = np.mean([np.trim_zeros(row, "b")[-1] == 1 for row in one])  # "seeded" ends without an end id
    assert abs(plain - 0.75) < 4 * (0.75 * 0.25 / count) ** 0.5  # four standard deviations


def test_the_eval_split_goes_once_through_in_order_and_ends_with_padding(stream, folder):
    batches = list(stream().batches("eval", 0, one_device()))
    rows = np.concatenate([batch["targets"] for batch in batches])
    real = np.concatenate([batch["segment_ids"] for batch in batches]).any(axis=1)
    assert real.tolist() == [True] * HELD_OUT + [False] * (-HELD_OUT % 4)
    assert [Bytes().decode(row) for row in rows[real]] == [text for _, text in pairs_of(folder / "validation.tsv")]


def test_a_cache_in_the_format_of_seqio_is_read(stream, folder, tmp_path):
    import seqio
    import tensorflow as tf

    data = stream("cached", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"no finished cache of the task cached .* seqio_cache_tasks"):
        next(data.examples("train", 0, 0, 0))
    lines = [f"of the cache {i}" for i in range(10)]
    cache = tmp_path / "cached"
    cache.mkdir()
    prefix = seqio.get_cached_tfrecord_prefix(str(cache), "train")
    for shard in range(2):
        with tf.io.TFRecordWriter(f"{prefix}-0000{shard}-of-00002") as writer:
            for line in lines[shard::2]:
                example = {"targets": Bytes().encode(line), "targets_pretokenized": line}
                writer.write(seqio.dict_to_tfexample(example).SerializeToString())
    features = {
        "targets": {"shape": [None], "dtype": "int32"},
        "targets_pretokenized": {"shape": [], "dtype": "string"},
    }
    info = {"num_shards": 2, "features": features, "seqio_version": seqio.__version__}
    Path(seqio.get_cached_info_path(str(cache), "train")).write_text(json.dumps(info))
    Path(seqio.get_cached_stats_path(str(cache), "train")).write_text(json.dumps({"examples": len(lines)}))
    (cache / "COMPLETED").touch()
    found = list(data.examples("train", 0, 0, 0))
    assert sorted(texts(found)) == sorted(lines)
    assert all(np.trim_zeros(example["targets"], "b")[-1] == 1 for example in found)  # what follows the cache is done


def test_a_task_over_tensorflow_datasets_reads_its_records(stream, tmp_path):
    import seqio
    import tensorflow_datasets as tfds

    titles = [f"title {i} é" for i in range(5)]

    class Titles(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"title": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": ((title, {"title": title}) for title in titles)}

        def _generate_examples(self):
            raise NotImplementedError

    Titles(data_dir=tmp_path).download_and_prepare()
    rename = lambda dataset: dataset.map(lambda record: {"targets": record["title"]})
    seqio.TaskRegistry.add(
        "titles",
        seqio.TfdsDataSource("titles:1.0.0", str(tmp_path)),
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
        preprocessors=[rename, seqio.preprocessors.tokenize],
    )
    records = Tfds(name="titles", data_dir=str(tmp_path)).open("train")
    found = texts(stream("titles", shuffle=False).examples("train", 0, 0, 0))
    assert found == [record["title"].decode() for record in records]
    assert sorted(found) == titles


@pytest.mark.skipif(not (DATA / "tinyshakespeare").exists(), reason=f"no tinyshakespeare in {DATA}")
def test_packed_shakespeare_is_the_text_line_by_line(stream):
    data = stream("shakespeare", pack=True, task_feature_lengths=(("targets", 256),), shuffle=False)
    found = []
    for example in itertools.islice(data.examples("train", 0, 0, 0), 100):
        ids = example["segment_ids"]
        for segment in range(1, ids.max() + 1):
            line = example["targets"][ids == segment]
            assert line[-1] == 1
            found.append(Bytes().decode(line))
    lines = (DATA / "tinyshakespeare/input.txt").read_text().splitlines()
    assert len(found) > 400
    assert found == lines[: len(found)]


@pytest.mark.skipif(not (DATA / "gsm8k").exists(), reason=f"no gsm8k in {DATA}")
def test_gsm8k_is_marked_by_the_task_itself(folder):
    records = [json.loads(line) for line in (DATA / "gsm8k/test.jsonl").read_text().splitlines()[:20]]

    def predict(inputs):
        assert [Bytes().decode(ids) for ids in inputs] == [record["question"] for record in records]
        right = [f"I think #### {record['answer'].rpartition('#### ')[2]}" for record in records]
        return [*right[:15], *["#### none"] * 5]

    metrics = seqio_metrics("math", predict, modules=("axrepro_test_tasks",), split="test", num_examples=20)
    assert metrics == {"accuracy": 0.75}


def test_metrics_of_a_task_are_those_of_what_a_model_generates(folder, tmp_path):
    vocabulary = SeqIOVocabulary("measured", ("axrepro_test_tasks",))
    model = llama(vocab_size=vocabulary.size, dim=16, num_layers=1, num_heads=2, hidden=32)
    params = init_params(model.specs(), jax.random.key(0))
    validation = pairs_of(folder / "validation.tsv")

    def answer(ids) -> np.ndarray:
        prompt = np.append(0, ids)
        return sample(model, params, prompt, 40, eos_id=vocabulary.eos_id, seed=1)[len(prompt) :]

    @jax.jit
    def total(tokens, length):
        ctx = Context(dtype="float32", platform="cpu")
        hidden, _ = model.apply(params, tokens[None], ctx)
        log_probs = jax.nn.log_softmax(model.logits(params, hidden, ctx)[0, :-1])
        place = jnp.arange(len(tokens) - 1)
        return jnp.sum(jnp.where(place < length - 1, log_probs[place, tokens[1:]], 0))

    def likelihood(ids) -> float:
        tokens = [0, *ids]
        return float(total(jnp.asarray(np.pad(tokens, (0, 96 - len(tokens)))), len(tokens)))

    def encoded(text) -> list[int]:
        return [*vocabulary.encode(text).tolist(), vocabulary.eos_id]

    answers = []

    def predict(inputs):
        answers.extend(answer(ids) for ids in inputs)
        answers[0] = encoded(validation[0][1].swapcase())  # right but for its case, which postprocessing drops
        return answers

    def score(inputs, targets):
        return np.array([likelihood([*i, *t]) for i, t in zip(inputs, targets, strict=True)])

    modules = ("axrepro_test_tasks",)
    metrics = seqio_metrics("measured", predict, score, modules=modules)
    wanted = np.mean([likelihood([*encoded(question), *encoded(text)]) for question, text in validation])
    assert metrics.keys() == {"accuracy", "score", "characters"}
    assert metrics["accuracy"] == pytest.approx(1 / HELD_OUT)
    assert metrics["score"] == pytest.approx(wanted, rel=1e-5)
    assert metrics["characters"] == sum(len(text) for _, text in validation)

    as_text = lambda inputs: [vocabulary.decode(ids) for ids in answers]
    assert seqio_metrics("measured", as_text, score, modules=modules) == metrics


def test_vocabularies_agree_with_ours(folder, tmp_path):
    import sentencepiece
    import seqio

    text = "the quick brown fox jumps over a lazy dog é"
    theirs = SeqIOVocabulary("lines", ("axrepro_test_tasks",))
    assert (theirs.size, theirs.pad_id, theirs.eos_id) == (Bytes().size, Bytes().pad_id, Bytes().eos_id)
    np.testing.assert_array_equal(theirs.encode(text), Bytes().encode(text))
    assert theirs.fingerprint == Bytes().fingerprint
    ids = [1, *theirs.encode(text), 1, 0, 0]
    assert theirs.decode(ids) == Bytes().decode(ids) == text

    words = np.random.default_rng(0).choice(text.split(), (200, 6))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(" ".join, words),
        model_prefix=str(tmp_path / "model"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = str(tmp_path / "model.model")
    features = {"targets": seqio.Feature(seqio.SentencePieceVocabulary(path))}
    seqio.TaskRegistry.add(
        "pieces", seqio.TextLineDataSource({"train": path}), output_features=features, preprocessors=[]
    )
    theirs, ours = SeqIOVocabulary("pieces"), SentencePiece(path)
    assert (theirs.size, theirs.pad_id, theirs.eos_id) == (ours.size, ours.pad_id, ours.eos_id)
    assert theirs.fingerprint == ours.fingerprint
    sentence = "a quick dog jumps over the fox"
    np.testing.assert_array_equal(theirs.encode(sentence), ours.encode(sentence))
    assert theirs.decode([*ours.encode(sentence), 1]) == sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "line"}, "did you mean 'lines'"),
        ({"modules": ("no_such_module",)}, "cannot import 'no_such_module'"),
        ({"split": "training"}, "lines has no split 'training'; did you mean 'train'"),
        ({"converter": "LMFeaturConverter"}, "did you mean 'LMFeatureConverter'"),
        ({"task_feature_lengths": (("inputs", 3), ("targets", 3))}, "SeqIO could not make the train split of lines"),
    ],
)
def test_wrong_input_is_refused(stream, changes, message):
    data = dataclasses.replace(stream(), **changes)
    with pytest.raises(UserError, match=message):
        next(data.examples("train", 0, 0, 0))


def test_lengths_are_pairs_of_a_name_and_a_size():
    with pytest.raises(UserError, match="task_feature_lengths"):
        SeqIO(batch_size=1, task="lines", task_feature_lengths=(("targets", 0),))


def test_metrics_that_a_task_lacks_or_that_need_another_function_are_refused(folder):
    modules = ("axrepro_test_tasks",)
    with pytest.raises(UserError, match="defines no metrics"):
        seqio_metrics("pairs", len, modules=modules)
    with pytest.raises(UserError, match="metric of the kind score"):
        seqio_metrics("measured", lambda inputs: [""] * len(inputs), modules=modules)


def test_the_size_of_the_vocabulary_is_known_without_reading_data(stream):
    assert stream().vocab_size == 259
