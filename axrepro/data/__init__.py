"""The input: sources of records, what is made of them, and batches sharded over the mesh.

The way of a record: a `Source` opens `Records`, looked up by number; transforms (`records.py` says what they are) turn
each into an example; a `Data` config, such as `Text` or `Pipeline`, packs or stacks examples to rows, which are a
function of seed and index alone; `Batches` put rows on the mesh. `Mixture` draws from several of them at rates that may
change with the step, and a `Stream` is for what cannot be looked up.

So a new kind of file is a `Source` in `sources/`, a new way to prepare it a transform in `transforms/`, a new way to
map text to ids a `Vocabulary`, another way to fill rows a `Packing`, and another command a file in `tools/`. Heavy
libraries (TensorFlow, Grain, SentencePiece, PIL) are imported inside the functions that need them.
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
    ExamplesCursor,
    Split,
    batch_shardings,
    logical_axes,
)
from axrepro.data.markov import ChainSamples, MarkovChains
from axrepro.data.mixture import Curriculum, Fixed, Mixture, Part, Rates, Stage, Temperature
from axrepro.data.packing import BestFit, Concatenate, FirstFit, Packing, Plan, Segments
from axrepro.data.pipeline import Feature, Pipeline
from axrepro.data.prefetch import prefetch
from axrepro.data.records import BadRecord, Example, Faults, Records, Source, Transform
from axrepro.data.seqio import SeqIO, SeqIOVocabulary, seqio_metrics
from axrepro.data.shuffle import permutation
from axrepro.data.sources.array_record import ArrayRecords, write_array_records
from axrepro.data.sources.audio import AudioFiles
from axrepro.data.sources.decontaminated import Decontaminated
from axrepro.data.sources.files import FromFunction, JsonLines, PythonStdlib, TextFiles
from axrepro.data.sources.images import CaptionedImages, ImageFolders
from axrepro.data.sources.parquet import Parquet
from axrepro.data.sources.tfds import Tfds
from axrepro.data.stream import Stream, StreamBatches
from axrepro.data.text import MemoryStore, PackedText, Text
from axrepro.data.transforms.audio import AddNoise, CropOrPadAudio, DecodeAudio, LogMel, NormaliseFeatures, SpecAugment
from axrepro.data.transforms.denoising import FillInTheMiddle, PrefixLM, SpanCorruption
from axrepro.data.transforms.fields import FieldTransform, OneHot
from axrepro.data.transforms.formats import Chat, Template, Tokenise
from axrepro.data.transforms.image_augmentation import (
    ColourJitter,
    GaussianBlur,
    Greyscale,
    MultiCrop,
    RandAugment,
    Solarise,
)
from axrepro.data.transforms.images import (
    CentreCrop,
    DecodeImage,
    FlipHorizontal,
    NormaliseImage,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)
from axrepro.data.transforms.pairs import Mixup, PairTransform
from axrepro.data.vocabulary import Bytes, HuggingFace, SentencePiece, Vocabulary

__all__ = [
    "AddNoise",
    "ArrayRecords",
    "AudioFiles",
    "BadRecord",
    "Batches",
    "BestFit",
    "Bytes",
    "CaptionedImages",
    "CentreCrop",
    "ChainSamples",
    "Chat",
    "ColourJitter",
    "Concatenate",
    "CropOrPadAudio",
    "Curriculum",
    "Cursor",
    "CursorBatches",
    "Data",
    "DecodeAudio",
    "DecodeImage",
    "Decontaminated",
    "Example",
    "Examples",
    "ExamplesCursor",
    "Faults",
    "Feature",
    "FieldTransform",
    "FillInTheMiddle",
    "FirstFit",
    "Fixed",
    "FlipHorizontal",
    "FromFunction",
    "GaussianBlur",
    "Greyscale",
    "HuggingFace",
    "ImageFolders",
    "JsonLines",
    "LogMel",
    "MarkovChains",
    "MemoryStore",
    "Mixture",
    "Mixup",
    "MultiCrop",
    "NormaliseFeatures",
    "NormaliseImage",
    "OneHot",
    "PackedText",
    "Packing",
    "PairTransform",
    "Parquet",
    "Part",
    "Pipeline",
    "Plan",
    "PrefixLM",
    "PythonStdlib",
    "RandAugment",
    "RandomCrop",
    "RandomResizedCrop",
    "Rates",
    "Records",
    "Resize",
    "Segments",
    "SentencePiece",
    "SeqIO",
    "SeqIOVocabulary",
    "Solarise",
    "Source",
    "SpanCorruption",
    "SpecAugment",
    "Split",
    "Stage",
    "Stream",
    "StreamBatches",
    "Temperature",
    "Template",
    "Text",
    "TextFiles",
    "Tfds",
    "Tokenise",
    "Transform",
    "Vocabulary",
    "batch_shardings",
    "logical_axes",
    "permutation",
    "prefetch",
    "seqio_metrics",
    "write_array_records",
]
