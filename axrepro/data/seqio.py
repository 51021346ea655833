"""Tasks and mixtures that are registered with SeqIO: their batches, their vocabularies and their metrics.

TensorFlow is imported when a stream is opened or described, not before. It is kept off the accelerators, and its
operations are made deterministic for the whole process.
"""

import contextlib
import hashlib
import importlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, SupportsIndex

import jax
import numpy as np

from axrepro.data.base import Split
from axrepro.data.stream import Stream
from axrepro.data.vocabulary import Bytes, Vocabulary
from axrepro.errors import UserError, nearest, require

# SeqIO and TensorFlow keep the seeds of a pipeline in global variables while it is built
_building = threading.Lock()
_CHUNK = 32  # examples that pass from TensorFlow to numpy at once
_RENAMED = (
    ("input_tokens", "tokens"),
    ("target_tokens", "targets"),
    ("loss_weights", "loss_mask"),
    ("causal_attention", "prefix"),
)


@cache
def _libraries():
    """SeqIO and TensorFlow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import seqio
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"a SeqIO stream needs the package {error.name}, which is missing: pip install axrepro[tf]"
        ) from None
    except Exception as error:  # protobuf's own class
        if type(error).__name__ != "VersionError":
            raise
        raise UserError(
            "SeqIO cannot be imported, since sentencepiece 0.2.2 and later need a newer protobuf than the one that is "
            "installed: pip install 'sentencepiece<0.2.2'"
        ) from error
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    tf.config.experimental.enable_op_determinism()
    return seqio, tf


def _find(name: str, modules: tuple[str, ...]):
    """A task or mixture, and the tasks in it."""
    seqio, _ = _libraries()
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"cannot import {module!r}, which is to register SeqIO tasks: {error}") from None
    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name not in names:
        raise UserError(
            f"no SeqIO task or mixture is called {name!r}; {nearest(name, names)}. Name the modules that register it "
            "in `modules`"
        )
    found = seqio.get_mixture_or_task(name)
    return found, seqio.get_subtasks(found)


def _require_split(provider, split: str) -> None:
    if split not in provider.splits:
        raise UserError(f"{provider.name} has no split {split!r}; {nearest(split, provider.splits)}")


def _use_cache(tasks, directory: str) -> None:
    """Makes SeqIO read the preprocessed examples of these tasks, where they have a place to be cached."""
    seqio, _ = _libraries()
    if directory not in seqio.utils.get_global_cache_dirs():
        seqio.add_global_cache_dirs([directory])
    for task in tasks:
        wanted = os.path.join(directory, seqio.utils.get_task_dir_from_name(task.name))
        if task.supports_caching and task.cache_dir != wanted:
            raise UserError(
                f"there is no finished cache of the task {task.name} at {wanted}"
                + (f", and this process reads it from {task.cache_dir}" if task.cache_dir else "")
                + f"; write it with seqio_cache_tasks --tasks={task.name} --output_cache_dir={directory}"
            )


@contextlib.contextmanager
def _named(task: str, split: str) -> Iterator[None]:
    """What TensorFlow says of unusable data, as errors of the user."""
    _, tf = _libraries()
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, tf.errors.OpError) as error:
        message = " ".join(str(error).split())[:400]
        raise UserError(f"SeqIO could not make the {split} split of {task}: {message}") from error


@dataclass(frozen=True, kw_only=True)
class SeqIO(Stream):
    """Examples of a task or mixture, made by its own preprocessors and one of SeqIO's feature converters.

    Batches hold int32[B, T] "tokens", "targets", "segment_ids" and "positions", and float32[B, T] "loss_mask"; without
    packing a row is one segment. A prefix language model adds bool[B, T] "prefix", which is True where SeqIO's
    "decoder_causal_attention" is 1. An encoder before a decoder has "encoder_tokens", "encoder_segment_ids" and
    "encoder_positions"; an encoder alone has the names of a decoder. The first input of a segment is SeqIO's
    id 0, not the end id as in `PackedText`. Other arrays of numbers keep their names.

    A task goes through its examples once an epoch. A mixture has no epochs: its tasks repeat by themselves, so that
    their rates hold. All shards have one seed, as SeqIO's sharding needs.

    On one core, lines of text with `ByteVocabulary` give 700 packed rows of 512 tokens a second, or 2,400 rows of 256
    without packing; skipping to where a run ended takes as long. TensorFlow traces the preprocessors anew for every
    epoch of every shard, which takes 1 to 2 s: for a small data set, records that are looked up by number are faster.

    Attributes:
      task: its registered name.   modules: those to import first, which register it.
      task_feature_lengths: pairs of a feature of the task and the length it is cut or padded to.
      converter: a class of SeqIO by name, or what takes `pack` and returns a `seqio.FeatureConverter`.
      pack: whether several examples share a row.
      split, eval_split: names of splits. An eval_split of None: there is none.
      shuffle: whether train examples are shuffled.
      cache_dir: where `seqio_cache_tasks` wrote the preprocessed examples; None: preprocess while reading.
    """

    task: str
    task_feature_lengths: tuple[tuple[str, int], ...]
    modules: tuple[str, ...] = ()
    converter: str | Callable[..., Any] = "LMFeatureConverter"
    pack: bool = True
    split: str = "train"
    eval_split: str | None = "validation"
    shuffle: bool = True
    cache_dir: str | None = None

    def __post_init__(self):
        super().__post_init__()
        whole = all(isinstance(size, int) and size > 0 for _, size in self.task_feature_lengths)
        pairs = len(self.task_feature_lengths) > 0 and whole
        require(self, "task_feature_lengths", pairs, 'pairs like ("targets", 512), at least one, of 1 or more')

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct((self.batch_size, *shape), dtype) for name, shape, dtype in _described(self)}

    @property
    def vocab_size(self) -> int:
        provider, _ = _find(self.task, self.modules)
        features = [provider.output_features[name] for name, _ in self.task_feature_lengths]
        return max(feature.vocabulary.vocab_size for feature in features)

    def endless(self, split: Split) -> bool:
        seqio, _ = _libraries()
        return split == "train" and isinstance(_find(self.task, self.modules)[0], seqio.Mixture)

    def _converter(self):
        seqio, _ = _libraries()
        make = self.converter
        if isinstance(make, str):
            if not hasattr(seqio, make):
                known = [name for name in dir(seqio) if name.endswith("FeatureConverter")]
                raise UserError(f"SeqIO.converter={make!r}: SeqIO has no such class; {nearest(make, known)}")
            make = getattr(seqio, make)
        return make(pack=self.pack)

    def examples(self, split: Split, seed: int, epoch: int, shard: int) -> Iterator[dict[str, np.ndarray]]:
        seqio, tf = _libraries()
        name = self.split if split == "train" else self.eval_split
        if name is None:
            raise UserError(f"SeqIO {self.task} has no eval split; set eval_split")
        provider, tasks = _find(self.task, self.modules)
        _require_split(provider, name)
        if self.cache_dir is not None:
            _use_cache(tasks, self.cache_dir)
        seed = int(np.random.SeedSequence([seed % 2**64, epoch]).generate_state(1)[0] >> 1) if split == "train" else 0
        options = tf.data.Options()
        options.deterministic = True
        with _named(self.task, name), _building:
            tf.random.set_seed(seed)  # for preprocessors that draw without a seed of their own
            dataset = seqio.get_dataset(
                self.task,
                dict(self.task_feature_lengths),
                self._converter(),
                dataset_split=name,
                use_cached=self.cache_dir is not None,
                shuffle=self.shuffle and split == "train",
                num_epochs=None if self.endless(split) else 1,
                shard_info=seqio.ShardInfo(index=shard, num_shards=self.shards) if self.shards > 1 else None,
                verbose=False,
                seed=seed,
            )
            numbers = [key for key, spec in dataset.element_spec.items() if _is_number(spec)]
            if len(numbers) < len(dataset.element_spec):
                plain = tf.autograph.experimental.do_not_convert
                dataset = dataset.map(plain(lambda example: {key: example[key] for key in numbers}))
            chunks = iter(dataset.batch(_CHUNK).prefetch(1).with_options(options).as_numpy_iterator())
        while True:
            with _named(self.task, name):
                chunk = next(chunks, None)
            if chunk is None:
                return
            arrays = _ours(chunk)
            for row in range(len(next(iter(arrays.values())))):
                yield {key: value[row] for key, value in arrays.items()}


def _is_number(spec) -> bool:
    return spec.dtype.is_integer or spec.dtype.is_floating or spec.dtype.is_bool


@lru_cache(maxsize=16)
def _described(data: SeqIO) -> tuple[tuple[str, tuple[int, ...], np.dtype], ...]:
    """Name, shape and type of each array of an example: those of the converter's answer to no example at all."""
    _, tf = _libraries()
    provider, _ = _find(data.task, data.modules)
    converter = data._converter()
    features = getattr(converter, "TASK_FEATURES", {}) | dict(provider.output_features)
    lengths = dict(data.task_feature_lengths)
    signature = {
        name: tf.TensorSpec([lengths.get(name), None, None, None][: feature.rank], tf.as_dtype(feature.dtype))
        for name, feature in features.items()
    }
    with _named(data.task, data.split), _building:
        empty = tf.data.Dataset.from_generator(lambda: iter(()), output_signature=signature)
        specs = converter(empty, lengths).element_spec
    specs = {name: spec for name, spec in specs.items() if _is_number(spec)}
    for name, spec in specs.items():
        if not spec.shape.is_fully_defined():
            raise UserError(f"the converter {data.converter} leaves the shape of {name!r} open, {spec.shape}")
    arrays = _ours({name: np.zeros((1, *spec.shape), spec.dtype.as_numpy_dtype) for name, spec in specs.items()})
    return tuple((name, array.shape[1:], array.dtype) for name, array in arrays.items())


def _ours(chunk: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of several examples by our names and types. Segments and positions are added where nothing was packed."""
    main = "decoder_" if any(name.startswith("decoder_") for name in chunk) else "encoder_"
    arrays = {}
    for name, value in chunk.items():
        name = name.removeprefix(main)
        for old, new in _RENAMED:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        kind = np.float32 if np.issubdtype(value.dtype, np.floating) or name == "loss_mask" else np.int32
        arrays[name] = value.astype(bool if value.dtype == bool or name == "prefix" else kind)
    for prefix, shown in (("", "targets"), ("encoder_", "encoder_tokens")):
        if shown in arrays and f"{prefix}segment_ids" not in arrays:
            real = np.cumsum((arrays[shown] != 0)[:, ::-1], axis=1)[:, ::-1] > 0  # up to the last id that is no padding
            arrays[f"{prefix}segment_ids"] = real.astype(np.int32)
            arrays[f"{prefix}positions"] = np.where(real, np.arange(real.shape[1]), 0).astype(np.int32)
    return arrays


@dataclass(frozen=True)
class SeqIOVocabulary(Vocabulary):
    """The vocabulary of a feature of a task, as SeqIO has it.

    Attributes:
      task, modules: as in `SeqIO`.   feature: whose vocabulary.
    """

    task: str
    modules: tuple[str, ...] = ()
    feature: str = "targets"

    @property
    def _inner(self):
        provider, _ = _find(self.task, self.modules)
        if self.feature not in provider.output_features:
            raise UserError(
                f"{self.task} has no feature {self.feature!r}; {nearest(self.feature, provider.output_features)}"
            )
        return provider.output_features[self.feature].vocabulary

    @property
    def name(self) -> str:
        return f"seqio:{self.task}/{self.feature}"

    @property
    def fingerprint(self) -> str:
        """That of `Bytes` and of `SentencePiece`, where those give the same ids."""
        seqio, tf = _libraries()
        inner = self._inner
        if isinstance(inner, seqio.ByteVocabulary):
            return Bytes.fingerprint
        if isinstance(inner, seqio.SentencePieceVocabulary):
            with tf.io.gfile.GFile(inner.sentencepiece_model_file, "rb") as file:
                return hashlib.sha256(file.read()).hexdigest()
        pieces = [inner.decode([i]) for i in range(inner.vocab_size)]
        return hashlib.sha256(repr((type(inner).__name__, pieces)).encode()).hexdigest()

    @property
    def size(self) -> int:
        return self._inner.vocab_size

    @property
    def pad_id(self) -> int:
        return self._inner.pad_id

    @property
    def eos_id(self) -> int:
        eos = self._inner.eos_id
        if eos is None:
            raise UserError(f"the vocabulary of {self.task}/{self.feature} has no end id, which documents end with")
        return eos

    def encode(self, text: bytes | str) -> np.ndarray:
        text = text.decode() if isinstance(text, bytes) else text
        return np.asarray(self._inner.encode(text), np.int32)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        inner = self._inner
        return inner.decode([i for i in map(int, ids) if i not in (inner.pad_id, inner.eos_id)])


Tokens = np.ndarray  # int32[N]


def seqio_metrics(
    task: str,
    predict: Callable[[list[Tokens]], Sequence[str | Tokens]] | None = None,
    score: Callable[[list[Tokens], list[Tokens]], np.ndarray] | None = None,
    *,
    modules: tuple[str, ...] = (),
    split: str = "validation",
    num_examples: int | None = None,
    task_feature_lengths: tuple[tuple[str, int], ...] | None = None,
    cache_dir: str | None = None,
) -> dict[str, float]:
    """The metrics that a task defines, of what a model predicts: its own postprocessing and metric functions run.

    A language model trained on the task with `PrefixLMFeatureConverter` answers like this (id 0 comes first there):

        def predict(inputs):
            prompts = [np.append(0, ids) for ids in inputs]
            return [sample(model, params, p, len(p) + 64, eos_id=1, seed=i)[len(p) :] for i, p in enumerate(prompts)]

        seqio_metrics("gsm8k", predict, modules=("my_tasks",))

    Args:
      task, modules, cache_dir: as in `SeqIO`; of a mixture, every task that has metrics and the split is evaluated.
      predict: from the "inputs" of all examples (no ids where a task has none) to an answer for each: text, or ids, of
        which those up to the first end id count.
      score: from all "inputs" and "targets" to the log-likelihood of each example's targets.
      num_examples: the first so many of each task; None: all.
      task_feature_lengths: cuts the features of the task; None: nothing is cut.

    Returns:
      The metrics that are numbers, by name; of a mixture by "task/name".

    Raises:
      UserError: if the task has no metrics or no such split, or one of its metrics needs the function that is missing.
    """
    seqio, _ = _libraries()
    provider, tasks = _find(task, modules)
    _require_split(provider, split)
    if cache_dir is not None:
        _use_cache(tasks, cache_dir)

    class Unchanged(seqio.PassThroughFeatureConverter):
        TASK_FEATURES: Mapping = {}
        pack = False

    with _named(task, split), _building:
        evaluator = seqio.Evaluator(
            task,
            Unchanged(),
            eval_split=split,
            use_cached=cache_dir is not None,
            sequence_length=None if task_feature_lengths is None else dict(task_feature_lengths),
            num_examples=num_examples,
            async_compute_metrics=False,
        )
    if not evaluator.eval_tasks:
        raise UserError(f"{task} defines no metrics for its {split} split")
    kinds = seqio.metrics.ModelOutputType
    given = {kinds.PREDICTION: predict, kinds.SCORE: score}
    for one in evaluator.eval_tasks:
        for metric in one.metric_objs:
            if given.get(metric.model_output_type) is None:
                needs = metric.model_output_type.name.lower()
                raise UserError(f"{one.name} has a metric of the kind {needs}; give seqio_metrics that function")

    def column(dataset, name: str) -> list[Tokens]:
        return [example.get(name, np.zeros(0, np.int32)) for _, example in dataset.as_numpy_iterator()]

    def predictions(dataset):
        assert predict is not None  # checked above, by the kinds of metrics
        inputs = column(dataset, "inputs")
        answers = list(predict(inputs))
        if len(answers) != len(inputs):
            raise ValueError(f"predict gave {len(answers)} answers to {len(inputs)} inputs")
        if answers and not isinstance(answers[0], str):
            vocabulary = evaluator.eval_tasks[0].output_features["targets"].vocabulary
            end = vocabulary.pad_id if vocabulary.eos_id is None else vocabulary.eos_id
            longest = max(map(len, answers))
            answers = [
                np.pad(np.asarray(ids, np.int32), (0, longest - len(ids)), constant_values=end) for ids in answers
            ]
        return list(enumerate(answers))

    def scores(dataset):
        assert score is not None
        inputs, targets = column(dataset, "inputs"), column(dataset, "targets")
        values = np.asarray(score(inputs, targets), np.float64)
        if values.shape != (len(targets),):
            raise ValueError(f"score gave an array of shape {values.shape} for {len(targets)} examples")
        return list(enumerate(values))

    functions: dict[Any, Any] = {kinds.PREDICTION: predictions, kinds.SCORE: scores}
    found, _ = evaluator.evaluate(compute_metrics=True, model_fns=functions)
    out = {}
    for name, metrics in found.result().items():
        for key, value in metrics.items():
            value = getattr(value, "value", value)
            if np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.number):
                out[key if provider is tasks[0] else f"{name}/{key}"] = float(value)
    return out
