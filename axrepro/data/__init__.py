"""The input: sources of records, what is made of them, and batches sharded over the mesh.

The way of a record: a `Source` (`sources.py` has plain files) opens `Records`, looked up by number; transforms
(`records.py` says what they are) turn each into an example; a `Data` config, such as `Text` or `Pipeline`, packs or
stacks examples to rows, which are a function of seed and index alone; `Batches` put rows on the mesh. `Mixture` draws
from several of them at rates that may change with the step, and `Stream` is for what cannot be looked up.

So a new kind of file is a `Source`, a new way to prepare it is a transform, a new way to map text to ids a
`Vocabulary`, and another way to fill rows a `Packing`. Heavy libraries (TensorFlow, Grain, SentencePiece, PIL) are
imported inside the functions that need them.
"""

import os
import sys

if sys.orig_argv[1:3] == ["-m", __name__]:  # that command looks for no accelerator, which would make noise
    os.environ["JAX_PLATFORMS"] = "cpu"

from axrepro.data.base import (
    Batches,
    Cursor,
    CursorBatches,
    Data,
    Examples,
    IndexedBatches,
    Split,
    batch_shardings,
    logical_axes,
)
from axrepro.data.markov import ChainSamples, MarkovChains
from axrepro.data.mixture import Curriculum, Fixed, Mixture, Part, Rates, Stage, Temperature
from axrepro.data.packing import BestFit, Concatenate, FirstFit, Packing, Plan, Segments
from axrepro.data.pairs import Mixup, PairTransform
from axrepro.data.pipeline import Feature, Pipeline
from axrepro.data.prefetch import prefetch
from axrepro.data.records import BadRecord, Example, Faults, Records, Source, Transform
from axrepro.data.shuffle import permutation
from axrepro.data.sources import FromFunction, JsonLines, PythonStdlib, TextFiles
from axrepro.data.text import MemoryStore, PackedText, Text
from axrepro.data.vocabulary import Bytes, SentencePiece, Vocabulary

__all__ = [
    "BadRecord",
    "Batches",
    "BestFit",
    "Bytes",
    "ChainSamples",
    "Concatenate",
    "Curriculum",
    "Cursor",
    "CursorBatches",
    "Data",
    "Example",
    "Examples",
    "Faults",
    "Feature",
    "FirstFit",
    "Fixed",
    "FromFunction",
    "IndexedBatches",
    "JsonLines",
    "MarkovChains",
    "MemoryStore",
    "Mixture",
    "Mixup",
    "PackedText",
    "Packing",
    "PairTransform",
    "Part",
    "Pipeline",
    "Plan",
    "PythonStdlib",
    "Rates",
    "Records",
    "Segments",
    "SentencePiece",
    "Source",
    "Split",
    "Stage",
    "Temperature",
    "Text",
    "TextFiles",
    "Transform",
    "Vocabulary",
    "batch_shardings",
    "logical_axes",
    "permutation",
    "prefetch",
]
