"""Documents below `data/`, and models that take no time."""

from dataclasses import replace

from axrepro.data import JsonLines, SentencePiece, Text, TextFiles
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import llama
from axrepro.optim import SGD, AdamW, Constant
from axrepro.train.experiment import Checkpointing, Experiment, Train


def tiny() -> Experiment:
    """Text files, read as bytes."""
    return Experiment(
        method=LanguageModel(model=llama(vocab_size=264, dim=8, num_layers=1, num_heads=1, hidden=8)),
        data=Text(source=TextFiles(pattern="data/*.txt", holdout=4), batch_size=8, sequence_length=16),
        optimizer=AdamW(learning_rate=Constant(value=0.01)),
        train=Train(steps=3, dtype="float32", log_every=1),
        checkpoint=Checkpointing(every=2),
    )


def json_lines() -> Experiment:
    """A document a line."""
    return replace(tiny(), data=replace(tiny().data, source=JsonLines(pattern="data/*.jsonl", holdout=4)))


def pieces() -> Experiment:
    """Text files, read as SentencePiece ids."""
    return replace(tiny(), data=replace(tiny().data, vocabulary=SentencePiece(path="data/vocabulary.model")))


def sgd() -> Experiment:
    """Another optimizer."""
    return replace(tiny(), optimizer=SGD(learning_rate=Constant(value=0.01)))
