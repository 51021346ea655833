"""The input: sources of documents, vocabularies, packing, and batches sharded over the mesh.

A new place that documents come from is a `Source` in `sources.py`. A new way to map text to ids is a `Vocabulary` in
`vocabulary.py`. Another kind of example, or other arrays in a batch, is a file of its own beside `text.py`, with
a `Data` config that opens `Examples`; what can only be streamed overrides `Data.batches`. Heavy libraries
(SentencePiece, TensorFlow, Grain) are imported inside the functions that need them.
"""

from axrepro.data.base import Batches, Data, Examples, IndexedBatches, Split, batch_shardings, logical_axes
from axrepro.data.markov import ChainSamples, MarkovChains
from axrepro.data.prefetch import prefetch
from axrepro.data.seqio import SeqIO, SeqIOVocabulary, seqio_metrics
from axrepro.data.shuffle import permutation
from axrepro.data.sources import Document, JsonLines, PythonStdlib, Source, TextFiles
from axrepro.data.stream import Stream, StreamBatches
from axrepro.data.text import PackedText, Text
from axrepro.data.tfds import Tfds, TfdsRecords
from axrepro.data.vocabulary import Bytes, SentencePiece, Vocabulary

__all__ = [
    "Batches",
    "Bytes",
    "ChainSamples",
    "Data",
    "Document",
    "Examples",
    "IndexedBatches",
    "JsonLines",
    "MarkovChains",
    "PackedText",
    "PythonStdlib",
    "SentencePiece",
    "SeqIO",
    "SeqIOVocabulary",
    "Source",
    "Split",
    "Stream",
    "StreamBatches",
    "Text",
    "TextFiles",
    "Tfds",
    "TfdsRecords",
    "Vocabulary",
    "batch_shardings",
    "logical_axes",
    "permutation",
    "prefetch",
    "seqio_metrics",
]
