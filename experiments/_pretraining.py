"""What the pretraining experiments share: settings by hardware, text from files, and a run that a test can afford."""

from axrepro.data import Bytes, PythonStdlib, SentencePiece, Text, TextFiles
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM
from axrepro.optim import AdamW, Cosine, Optimizer
from axrepro.train.compiler_flags import flags
from axrepro.train.experiment import Checkpointing, Evaluation, Experiment, MeshRule, Train


def mesh_rules(expert: int = 1, remat: str = "qkvo") -> tuple[MeshRule, ...]:
    """Weights over all chips that `expert` leaves; the less memory a chip has, the more is recomputed.

    Args:
      remat: what the chips with most memory keep; the others keep only the inputs of the blocks.
    """

    def rule(kind: str, remat: str) -> MeshRule:
        mesh = (("mesh.data", 1), ("mesh.fsdp", -1), ("mesh.expert", expert))
        return MeshRule(f"{kind}-.*", (*mesh, ("train.remat", remat), ("train.compiler_options", flags(kind))))

    return (
        rule("v4", "full"),
        rule("v5e", "full"),
        rule("v5p", remat),
        rule("v6e", "full"),
        rule("h100", "full"),
        rule("h200", remat),
    )


def pretraining(
    method: LanguageModel,
    *,
    tokens: float,
    batch_size: int,
    sequence_length: int,
    optimizer: Optimizer,
    rules: tuple[MeshRule, ...],
) -> Experiment:
    """A run over so many tokens of text files, with a checkpoint and an evaluation every 1000 steps."""
    return Experiment(
        method=method,
        data=Text(
            source=TextFiles(pattern="data/train/*.txt", eval_pattern="data/eval/*.txt"),
            vocabulary=SentencePiece(path="data/vocabulary.model"),
            batch_size=batch_size,
            sequence_length=sequence_length,
        ),
        optimizer=optimizer,
        train=Train(steps=round(tokens / (batch_size * sequence_length))),
        checkpoint=Checkpointing(every=1000, keep=3),
        eval=Evaluation(every=1000, batches=64),
        mesh_rules=rules,
    )


def small(model: CausalLM, *, sequence_length: int = 64, steps: int = 60) -> Experiment:
    """A byte-level run on the text of Python's standard library, for two CPU cores."""
    return Experiment(
        method=LanguageModel(model=model, chunk=None),
        data=Text(source=PythonStdlib(holdout=100), vocabulary=Bytes(), batch_size=8, sequence_length=sequence_length),
        optimizer=AdamW(learning_rate=Cosine(peak=3e-3, warmup=0.05, floor=0.05)),
        train=Train(steps=steps, dtype="float32"),
        checkpoint=Checkpointing(every=200),
        eval=Evaluation(every=200, batches=16),
    )
