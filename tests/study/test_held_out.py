"""Scores by document and by question, against the trainer's evaluation and loops over rows."""

import re
from collections import Counter
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from axrepro.core import MeshShape, make_mesh
from axrepro.core.config import override
from axrepro.core.interfaces import Layer
from axrepro.data import BestFit, Bytes, FromFunction, PythonStdlib, SentencePiece, Text, TextFiles
from axrepro.errors import UserError
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM
from axrepro.nn import RMSNorm
from axrepro.study.held_out import leaks, make_questions, score_documents, score_questions
from axrepro.train.evaluate import Evaluator
from axrepro.train.state import Program
from experiments import markov_chains, moe_dense

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()
MESHES = {"one": MeshShape(), "eight": MeshShape(data=2, fsdp=2, expert=2)}


def text(rng, lines):
    return "".join(" ".join(rng.choice(WORDS, 12)) + "\n" for _ in range(lines))


def held_out_and_training(split):
    """Twelve held-out documents in upper case, training documents in lower case."""
    rng = np.random.default_rng(0)
    documents = [{"text": text(rng, 3 + 2 * i)} for i in range(12)]
    return documents if split == "train" else [{"text": document["text"].upper()} for document in documents]


DATA = Text(source=FromFunction(held_out_and_training), batch_size=8, sequence_length=80)


def program_of(experiment, mesh: str) -> Program:
    devices = jax.devices()[: 1 if mesh == "one" else 8]
    return Program(replace(experiment, mesh=MESHES[mesh]), make_mesh(MESHES[mesh], devices), "cpu")


def tiny(kind: str):
    experiment = moe_dense.tiny() if kind == "moe" else override(moe_dense.dense_tiny(), {"method.model.dim": 64})
    experiment = override(experiment, {"method.model.dim": 32, "method.model.vocab_size": 264})
    return replace(experiment, data=DATA)
