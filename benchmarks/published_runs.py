"""Training runs that others measured and published, rebuilt with axrepro's layers: a model of step time is fitted to
some of them and checked against others.

The figures are theirs. What decides the time of a step is rebuilt as they state it: shapes, batch, mesh, what the
backward pass keeps, flags of the compiler. What is not stated is in `unknown`; what they state and is not so here, in
`differs`. Kernels and compiler were those of their day, and the loss is computed here in chunks of 512 positions.

Run: python -m benchmarks.published_runs
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from axrepro.core.config import swap
from axrepro.core.flops import Flops
from axrepro.core.sharding import MeshShape, Rules
from axrepro.kernels.attention import Mask
from axrepro.methods.language_model import LanguageModel
from axrepro.models.causal_lm import CausalLM, llama
from axrepro.nn import Attention, Block, FeedForward, LayerNorm, MoE, Repeat, RMSNorm, RoPE, Sequence
from axrepro.optim import AdamW, Cosine
from axrepro.train import compiler_flags
from axrepro.train.experiment import Experiment
from axrepro.train.hardware import CHIPS, parse_slice
from experiments._pretraining import pretraining
from experiments.llama import llama2_70b, llama3_8b, llama3_70b, llama3_405b
from experiments.mixtral import mixtral_8x7b, mixtral_8x22b


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One run on one slice.

    Attributes:
      topology: public name of the hardware.   model: builds the network.
      rows: sequences per chip and step.   length: tokens of a sequence.   mesh: chips per mesh axis.
      remat, flags: as `Train.remat` and `Train.compiler_options`; without flags, axrepro's own for the chip.
      accumulation: microbatches per step.
      seconds: of a step, where published.   tflops: TFLOP/s per chip, where published.
      counts: which matrix products of a token `tflops` counts: of attention none ("weights"), the part below the
        diagonal, or all.
      source: where it was read.   family: the same for runs of one model by one project; whoever fits to one of them
        has seen the others.
      unknown, differs: what the source leaves open; what it says and is not so here.
    """

    name: str
    family: str
    topology: str
    model: Callable[[], CausalLM]
    rows: int
    length: int
    mesh: MeshShape
    remat: str
    flags: tuple[tuple[str, str], ...] = ()
    accumulation: int = 1
    seconds: float | None = None
    tflops: float | None = None
    counts: Literal["weights", "causal", "full"] = "full"
    source: str
    unknown: str = ""
    differs: str = ""

    @property
    def chips(self) -> int:
        """Of all slices together."""
        _, chips, _, slices = parse_slice(self.topology)
        return chips * slices

    @property
    def tokens(self) -> int:
        """Per chip and step."""
        return self.rows * self.length

    def experiment(self) -> Experiment:
        """The run as axrepro would train it: float32 parameters, bfloat16 products, AdamW."""
        experiment = pretraining(
            LanguageModel(model=self.model()),
            tokens=1e12,
            batch_size=self.rows * self.chips,
            sequence_length=self.length,
            optimizer=AdamW(learning_rate=Cosine(peak=3e-4, warmup=2000, floor=0.1), weight_decay=0.1, clip=1.0),
            rules=(),
        )
        options = self.flags or compiler_flags.flags(parse_slice(self.topology)[0])
        train = replace(
            experiment.train, remat=self.remat, compiler_options=options, grad_accumulation=self.accumulation
        )
        return replace(
            experiment, mesh=self.mesh, rules=_MAXTEXT_RULES if self.mesh.model > 1 else Rules(), train=train
        )

    def flops(self) -> Flops:
        """Train FLOPs per token."""
        experiment = self.experiment()
        whole = experiment.method.flops({"tokens": (1, self.length), "targets": (1, self.length)})
        return Flops(causal=whole.causal / self.length, full=whole.full / self.length)

    def step_seconds(self) -> float:
        """As published, or what the published rate comes to."""
        if self.seconds is not None:
            return self.seconds
        flops = self.flops()
        counted = {"weights": 2 * flops.causal - flops.full, "causal": flops.causal, "full": flops.full}[self.counts]
        return counted * self.tokens / (self.tflops * 1e12)

    def rates(self) -> tuple[float, float]:
        """TFLOP/s per chip with attention as masked and in full."""
        flops, rate = self.flops(), self.tokens / self.step_seconds() / 1e12
        return flops.causal * rate, flops.full * rate

    def mfu(self) -> tuple[float, float]:
        """The same as shares of the chip's peak."""
        peak = CHIPS[parse_slice(self.topology)[0]].tflops
        causal, full = self.rates()
        return causal / peak, full / peak


# activations between the layers are split as well; the other projects here never split heads
_MAXTEXT_RULES = Rules(
    table=tuple((axis, ("model",) if axis == "embed_act" else names) for axis, names in Rules().table)
)


def _flags(names: str = "", **values: str) -> tuple[tuple[str, str], ...]:
    """Those that are switched on, separated by blanks, and those with another value."""
    return (*((name, "true") for name in names.split()), *values.items())


# as in benchmarks/xla_flags_library.py of MaxText; of its flags this compiler no longer knows xla_sc_disjoint_spmem
_DENSE_VMEM = _flags(xla_tpu_scoped_vmem_limit_kib="98304")
_MOE_VMEM = _flags(xla_tpu_scoped_vmem_limit_kib="81920")
_ALL_GATHER = _flags(
    "xla_tpu_enable_async_collective_fusion xla_tpu_enable_async_collective_fusion_fuse_all_gather "
    "xla_tpu_enable_async_collective_fusion_multiple_steps xla_tpu_overlap_compute_collective_tc "
    "xla_enable_async_all_gather"
)
_DATA_PARALLEL = _flags("xla_tpu_enable_data_parallel_all_reduce_opt xla_tpu_data_parallel_opt_different_sized_ops")
_LAYOUT = _flags(
    "xla_tpu_use_minor_sharding_for_major_trivial_input xla_tpu_assign_all_reduce_scatter_layout",
    xla_tpu_relayout_group_size_threshold_for_reduce_scatter="1",
)
_SPARSE_CORE_ALL_REDUCE = _flags(
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce xla_tpu_enable_all_reduce_offload_tracing "
    "xla_tpu_use_tc_device_shape_on_sc xla_sc_disable_megacore_partitioning",
    xla_tpu_enable_async_collective_fusion_fuse_all_reduce="false",
    xla_sc_enable_instruction_fusion="false",
)
_HOST_OFFLOAD = _flags(
    "xla_tpu_enable_all_experimental_scheduler_features xla_tpu_enable_scheduler_memory_pressure_tracking "
    "xla_tpu_enable_ag_backward_pipelining",
    xla_tpu_host_transfer_overlap_limit="24",
    xla_tpu_aggressive_opt_barrier_removal="ENABLED",
    xla_lhs_prioritize_async_depth_over_stall="ENABLED",
    xla_should_allow_loop_variant_parameter_in_chain="ENABLED",
    xla_should_add_loop_invariant_op_in_chain="ENABLED",
    xla_max_concurrent_host_send_recv="100",
    xla_tpu_scheduler_percent_shared_memory_limit="100",
    xla_latency_hiding_scheduler_rerun="2",
)
_NO_COLLECTIVE_MATMUL = _flags(xla_jf_spmd_threshold_for_windowed_einsum_mib="1000000")
_NO_BUNDLE_COST = _flags(xla_tpu_use_bundle_aware_cost_model_for_fusions="false")
_V4 = _flags("xla_enable_async_all_gather")
_V5E = _DATA_PARALLEL + _ALL_GATHER
_V5P = _V5E + _flags(
    "xla_enable_async_collective_permute xla_tpu_enable_ag_backward_pipelining",
    xla_tpu_megacore_fusion_allow_ags="false",
)
_V5P_2023 = tuple(flag for flag in _V5P if flag[0] != "xla_tpu_enable_async_collective_fusion_fuse_all_gather")
_LLAMA3_70B_V6E = _DENSE_VMEM + _LAYOUT + _V5E + _HOST_OFFLOAD
_LLAMA3_8B_V6E = _LLAMA3_70B_V6E + _SPARSE_CORE_ALL_REDUCE
_LLAMA3_70B_V7X = _flags(
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce xla_tpu_use_single_sparse_core_for_all_gather_offload",
    xla_tpu_scoped_vmem_limit_kib="61440",
    xla_tpu_bf16_emission_mode="NATIVE_EMISSION",
)

_FSDP = MeshShape(data=1, fsdp=-1)
_INPUT_AND_QKV = "offload:block_input,q,k,v"
_PRODUCTS_TO_HOST = "offload:q,k,v,attention_out,ffn_up,ffn_gate,ffn_down"


def _maxtext_2023(heads: int, dim: int, hidden: int, num_layers: int) -> Callable[[], CausalLM]:
    """MaxText's own model until the end of 2023: heads of 256, ReLU without a gate, tied embeddings."""
    shape = {"dim": dim, "num_layers": num_layers, "num_heads": heads, "hidden": hidden}
    plain = FeedForward(hidden=hidden, act="relu", gated=False)
    return lambda: swap(llama(vocab_size=32_768, head_dim=256, tied=True, **shape), FeedForward, lambda ffn: plain)


_MAXTEXT_2023 = {
    "16b": _maxtext_2023(32, 5120, 32768, 32),
    "22b": _maxtext_2023(24, 6144, 24576, 48),
    "32b": _maxtext_2023(32, 10240, 32768, 32),
    "64b": _maxtext_2023(32, 10240, 32768, 64),
    "128b": _maxtext_2023(64, 10240, 65536, 64),
    "512b": _maxtext_2023(64, 20480, 65536, 128),
}


def _gpt3() -> CausalLM:
    norm = LayerNorm()
    attention = Attention(num_heads=96, rope=None, qkv_bias=True, out_bias=True)
    ffn = FeedForward(hidden=49152, act="gelu_tanh", gated=False, bias=True)
    block = Block(attention=attention, ffn=ffn, norm=norm)
    return CausalLM(vocab_size=50_304, dim=12288, layers=Repeat(layer=block, times=96), norm=norm, tied=True)


def _gemma3_12b() -> CausalLM:
    def block(mask: Mask, base: float) -> Block:
        heads = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 256}
        attention = Attention(mask=mask, rope=RoPE(base=base), qk_norm=RMSNorm(), **heads)
        return Block(attention=attention, ffn=FeedForward(hidden=15360, act="gelu_tanh"), post_norm=RMSNorm())

    group = Sequence((block(Mask(window=1024), 10_000.0),) * 5 + (block(Mask(), 1_000_000.0),))
    layers = Repeat(layer=group, times=8)
    return CausalLM(vocab_size=262_144, dim=3840, layers=layers, tied=True, embed_scale=3840**0.5)


def _llama2_70b() -> CausalLM:
    return llama2_70b().method.model


def _llama3_8b() -> CausalLM:
    return llama3_8b().method.model


def _llama3_70b() -> CausalLM:
    return llama3_70b().method.model


def _llama3_405b() -> CausalLM:
    return llama3_405b().method.model


def _mistral_7b() -> CausalLM:
    shape = {"dim": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "hidden": 14336}
    return llama(vocab_size=32_000, **shape)


def _mixtral_8x7b() -> CausalLM:
    return mixtral_8x7b().method.model


def _mixtral_8x22b() -> CausalLM:
    return replace(mixtral_8x22b().method.model, vocab_size=32_768)


def _mixtral_dropless() -> CausalLM:
    return swap(_mixtral_8x7b(), MoE, lambda mixture: replace(mixture, dispatch="dropless"))


def _fuji_7b() -> CausalLM:
    return llama(vocab_size=32_768, dim=4096, num_layers=32, num_heads=32, head_dim=128, hidden=11008, tied=True)


def _fuji_70b() -> CausalLM:
    shape = {"dim": 8192, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128, "hidden": 28672}
    return llama(vocab_size=32_768, **shape)


def _honeycrisp_3b() -> CausalLM:
    shape = {"dim": 3072, "num_layers": 26, "num_heads": 24, "num_kv_heads": 8, "head_dim": 128, "hidden": 8064}
    return llama(vocab_size=49_152, qk_norm=RMSNorm(), tied=True, **shape)


_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes at c8cfe2f"
_V6E_RECIPES = f"training/trillium of {_RECIPES}"
_MAXTEXT = "github.com/AI-Hypercomputer/maxtext"
_TABLES = f"MaxText/configs/{{}}/README.md and the scripts beside it of {_MAXTEXT} at 76bd53b0f (December 2023)"
_AXLEARN = "axlearn/experiments/text/gpt/{} of github.com/apple/axlearn (July 2026)"
_FUJI = _AXLEARN.format("fuji.py")
_FUJI_UNKNOWN = "when it was measured, and what mesh and rematerialisation were then; here those of the file"
_FUJI_V1_UNKNOWN = "when it was measured, mesh and rematerialisation then; here the file's mesh and its default to keep"

RUNS = (
    *(
        PublishedRun(
            name=f"maxtext_{size}_{topology}",
            family="maxtext_2023_v5p",
            topology=topology,
            model=_MAXTEXT_2023[size],
            rows=rows,
            length=2048,
            mesh=MeshShape(data=-1, fsdp=fsdp, model=model),
            remat=remat,
            flags=_V5P_2023,
            tflops=tflops,
            counts="causal",
            source=_TABLES.format("v5p"),
            differs="they took 4 sequences per chip, which is 0.3 GiB too much here" if size == "64b" else "",
        )
        for size, topology, rows, fsdp, model, remat, tflops in (
            ("32b", "v5p-128", 8, 16, 4, "products", 328),
            ("32b", "2xv5p-128", 8, 16, 4, "products", 319),
            ("64b", "v5p-128", 3, 16, 4, "products", 323),
            ("64b", "2xv5p-128", 3, 16, 4, "products", 309),
            ("128b", "v5p-256", 2, 16, 8, "products", 315),
            ("128b", "2xv5p-256", 2, 16, 8, "products", 305),
            ("512b", "v5p-1024", 2, 32, 16, "full", 294),
        )
    ),
    *(
        PublishedRun(
            name=f"maxtext_{size}_{topology}",
            family="maxtext_2023_v5e",
            topology=topology,
            model=_MAXTEXT_2023[size],
            rows=rows,
            length=2048,
            mesh=MeshShape(data=-1, fsdp=256 // model, model=model),
            remat="full",
            flags=_V5E,
            tflops=tflops,
            counts="causal",
            source=_TABLES.format("v5e") + "; figures of October 2023",
        )
        for size, topology, rows, model, tflops in (
            ("16b", "v5e-256", 6, 1, 120),
            ("32b", "v5e-256", 4, 1, 132),
            ("64b", "v5e-256", 2, 1, 118),
            ("128b", "v5e-256", 1, 16, 110),
            ("16b", "4xv5e-256", 6, 1, 117),
            ("64b", "4xv5e-256", 2, 1, 110),
        )
    ),
    *(
        PublishedRun(
            name=f"maxtext_22b_{topology}",
            family="maxtext_2023_v4",
            topology=topology,
            model=_MAXTEXT_2023["22b"],
            rows=16,
            length=1024,
            mesh=MeshShape(data=-1, fsdp=64),
            remat="full",
            flags=_V4,
            tflops=tflops,
            counts="weights",
            source=f"README.md and MaxText/configs of {_MAXTEXT} at 281e04bf3 (April 2023)",
            differs="they multiplied out whole attention matrices",
        )
        for topology, tflops in (("v4-128", 156), ("4xv4-128", 149))
    ),
    PublishedRun(
        name="llama2_70b_v5p-1024",
        family="maxtext_llama2_70b",
        topology="v5p-1024",
        model=_llama2_70b,
        rows=4,
        length=4096,
        mesh=_FSDP,
        remat="products_but_ffn",
        flags=_V5E,
        seconds=4 * 4096 / 692,
        source=f"docs/reference/models/tiering.md of {_MAXTEXT} (692 tokens/s per chip), with the script it links",
        unknown="the MFU of 65.4 % beside it is neither of the two that follow from it",
    ),
    PublishedRun(
        name="llama2_70b_v6e-256",
        family="maxtext_llama2_70b",
        topology="v6e-256",
        model=_llama2_70b,
        rows=2,
        length=4096,
        mesh=_FSDP,
        remat="offload_qkv",
        flags=_DENSE_VMEM + _ALL_GATHER + _SPARSE_CORE_ALL_REDUCE,
        seconds=9.052,
        tflops=402.274,
        source=f"Llama2-70B-MaxText in {_V6E_RECIPES} (jax 0.5.2)",
        differs="their weights are split along another dimension (fsdp_transpose)",
    ),
    *(
        PublishedRun(
            name=f"llama3_8b_{topology}",
            family="maxtext_llama3_8b",
            topology=topology,
            model=_llama3_8b,
            rows=rows,
            length=8192,
            mesh=_FSDP,
            remat="offload_input_qkvo",
            flags=flags,
            seconds=seconds,
            tflops=tflops,
            source=f"Llama3.1-8B-MaxText/{topology} in {_V6E_RECIPES} (jax 0.6.1)",
        )
        for topology, rows, seconds, tflops, flags in (
            ("v6e-8", 3, 3.443, 413.433, _LLAMA3_8B_V6E + _NO_COLLECTIVE_MATMUL),
            ("v6e-16", 3, 3.393, 419.485, _LLAMA3_8B_V6E + _NO_COLLECTIVE_MATMUL),
            ("v6e-32", 3, 3.495, 407.225, _LLAMA3_8B_V6E + _NO_COLLECTIVE_MATMUL),
            ("v6e-64", 5, 5.652, 419.701, _LLAMA3_8B_V6E),
            ("v6e-128", 4, 4.602, 412.319, _LLAMA3_8B_V6E),
            ("v6e-256", 4, 4.546, 417.397, _LLAMA3_8B_V6E),
        )
    ),
    *(
        PublishedRun(
            name=f"llama3_70b_{topology}",
            family="maxtext_llama3_70b",
            topology=topology,
            model=_llama3_70b,
            rows=rows,
            length=8192,
            mesh=_FSDP,
            remat=_INPUT_AND_QKV,
            flags=flags,
            seconds=seconds,
            tflops=tflops,
            source=f"Llama3.1-70B-MaxText/{topology} in {_V6E_RECIPES} (jax 0.6.1)",
        )
        for topology, rows, seconds, tflops, flags in (
            ("v6e-64", 2, 18.688, 422.091, _LLAMA3_70B_V6E),
            ("v6e-128", 4, 34.786, 453.500, _LLAMA3_70B_V6E),
            ("v6e-256", 5, 42.656, 462.297, _LLAMA3_70B_V6E),
        )
    ),
    *(
        PublishedRun(
            name=f"llama3_70b_{topology}",
            family="maxtext_llama3_70b_v7x",
            topology=topology,
            model=_llama3_70b,
            rows=4,
            length=8192,
            mesh=_FSDP,
            remat="save:q,k,v,attention",
            flags=_LLAMA3_70B_V7X,
            seconds=seconds,
            tflops=tflops,
            counts="causal",
            source=f"training/ironwood/README.md of {_RECIPES}",
            differs="they keep the first moment in bfloat16",
        )
        for topology, seconds, tflops in (("v7x-128", 12.20, 1207.05), ("v7x-512", 12.27, 1199.67))
    ),
    PublishedRun(
        name="llama3_405b_v5p-1024",
        family="maxtext_llama3_405b",
        topology="v5p-1024",
        model=_llama3_405b,
        rows=2,
        length=8192,
        mesh=_FSDP,
        remat="offload:attention,ffn_down",
        flags=_DENSE_VMEM + _ALL_GATHER + _HOST_OFFLOAD,
        seconds=131.474,
        tflops=314.530,
        counts="causal",
        source=f"training/v5p/Llama3.1-405B-MaxText of {_RECIPES} (jax 0.7.0)",
    ),
    PublishedRun(
        name="gpt3_175b_v6e-256",
        family="maxtext_gpt3",
        topology="v6e-256",
        model=_gpt3,
        rows=3,
        length=2048,
        mesh=_FSDP,
        remat="full",
        flags=_DENSE_VMEM + _V5E + _NO_BUNDLE_COST,
        seconds=17.182,
        tflops=384.891,
        source=f"GPT3-175B-MaxText/bf16 in {_V6E_RECIPES} (jax 0.5.2)",
        differs="no learned positions are added to the embeddings",
    ),
    PublishedRun(
        name="mistral_7b_v6e-8",
        family="maxtext_mistral",
        topology="v6e-8",
        model=_mistral_7b,
        rows=6,
        length=8192,
        mesh=_FSDP,
        remat="offload_input_qkvo",
        flags=_LLAMA3_8B_V6E + _NO_COLLECTIVE_MATMUL,
        seconds=6.320,
        tflops=431.981,
        source=f"Mistral-7B-MaxText in {_V6E_RECIPES} (jax 0.5.2)",
    ),
    *(
        PublishedRun(
            name=f"gemma3_12b_{topology}",
            family="maxtext_gemma3",
            topology=topology,
            model=_gemma3_12b,
            rows=1,
            length=32768,
            mesh=MeshShape(data=-1, fsdp=256),
            remat="full",
            flags=_flags(xla_tpu_scoped_vmem_limit_kib="122880"),
            seconds=seconds,
            tflops=tflops,
            counts="causal",
            source=f"Gemma3-12B-MaxText in {_V6E_RECIPES} (jax 0.7.0)",
            unknown="the flags and batch across slices; here those of one",
        )
        for topology, seconds, tflops in (("v6e-256", 7.318, 349.442), ("2xv6e-256", 7.793, 328.139))
    ),
    PublishedRun(
        name="mixtral_8x7b_v6e-256",
        family="maxtext_mixtral",
        topology="v6e-256",
        model=_mixtral_8x7b,
        rows=12,
        length=4096,
        mesh=_FSDP,
        remat="offload_input_qkvo",
        flags=_MOE_VMEM + _V5E,
        seconds=13.484,
        tflops=302.311,
        source=f"Mixtral-8x7B-MaxText in {_V6E_RECIPES} (jax 0.5.2)",
    ),
    PublishedRun(
        name="mixtral_8x7b_v5p-256",
        family="maxtext_mixtral",
        topology="v5p-256",
        model=_mixtral_dropless,
        rows=36,
        length=4096,
        mesh=_FSDP,
        remat="full",
        flags=_V5P + _MOE_VMEM,
        seconds=36 * 4096 / 2909,
        source=f"docs/reference/models/tiering.md of {_MAXTEXT} (2,909 tokens/s per chip), with the script it links",
        unknown="whether the batch was that of the script",
        differs="their parameters are bfloat16",
    ),
    PublishedRun(
        name="mixtral_8x22b_v6e-256",
        family="maxtext_mixtral",
        topology="v6e-256",
        model=_mixtral_8x22b,
        rows=8,
        length=4096,
        mesh=MeshShape(data=1, fsdp=64, expert=4),
        remat="offload_input_qkvo",
        flags=_MOE_VMEM + _V5E,
        seconds=24.706,
        tflops=332.463,
        source=f"Mixtral-8x22B-MaxText in {_V6E_RECIPES} (libtpu of November 2024)",
        differs="their parameters are bfloat16",
    ),
    *(
        PublishedRun(
            name=f"fuji_7b_v1_{topology}",
            family="axlearn_7b",
            topology=topology,
            model=_fuji_7b,
            rows=rows,
            length=2048,
            mesh=MeshShape(data=-1, fsdp=fsdp),
            remat="qkvo",
            seconds=seconds,
            source=_FUJI,
            unknown=_FUJI_V1_UNKNOWN,
        )
        for topology, rows, fsdp, seconds in (
            ("v4-1024", 4, 16, 3.03),
            ("4xv5e-256", 2, 256, 2.44),
            ("v5p-512", 8, 64, 2.85),
        )
    ),
    PublishedRun(
        name="fuji_7b_v2_4xv5e-256",
        family="axlearn_7b",
        topology="4xv5e-256",
        model=_fuji_7b,
        rows=1,
        length=4096,
        mesh=MeshShape(data=-1, fsdp=256),
        remat="products",
        seconds=2.21,
        source=_FUJI,
        unknown=_FUJI_UNKNOWN,
    ),
    PublishedRun(
        name="fuji_70b_v2_4xv5e-256",
        family="axlearn_70b",
        topology="4xv5e-256",
        model=_fuji_70b,
        rows=1,
        length=4096,
        mesh=MeshShape(data=-1, fsdp=256),
        remat=_PRODUCTS_TO_HOST,
        seconds=14.3736,
        source=_FUJI,
        unknown=_FUJI_UNKNOWN,
    ),
    PublishedRun(
        name="fuji_70b_v2_4xv6e-256",
        family="axlearn_70b",
        topology="4xv6e-256",
        model=_fuji_70b,
        rows=1,
        length=4096,
        mesh=MeshShape(data=-1, fsdp=256),
        remat=_INPUT_AND_QKV,
        seconds=4.9,
        source=_FUJI,
        unknown=_FUJI_UNKNOWN,
    ),
    PublishedRun(
        name="fuji_70b_v2_v6e-256",
        family="axlearn_70b",
        topology="v6e-256",
        model=_fuji_70b,
        rows=4,
        length=4096,
        mesh=_FSDP,
        remat="offload:q,k,v,attention,attention_out",
        accumulation=4,
        seconds=19.5,
        source=_FUJI,
        unknown=_FUJI_UNKNOWN,
    ),
    *(
        PublishedRun(
            name=f"honeycrisp_3b_{topology}",
            family="axlearn_3b",
            topology=topology,
            model=_honeycrisp_3b,
            rows=rows,
            length=4096,
            mesh=MeshShape(data=-1),
            remat="products",
            seconds=seconds,
            source=_AXLEARN.format("honeycrisp.py"),
            unknown="when it was measured",
            differs="their optimizer is another",
        )
        for topology, rows, seconds in (("v5p-1024", 4, 1.48), ("v5p-2048", 2, 0.8), ("v5p-4096", 1, 0.47))
    ),
)


def main() -> None:
    """Prints what each run comes to, in both ways to count attention."""
    print(
        "| run | chips | sequences per chip · length | step s | TFLOP/s per chip, causal / full | MFU, causal / full |"
    )
    print("|---|---|---|---|---|---|")
    for run in RUNS:
        rates, mfu = ((f"{x:.1f} / {y:.1f}") for x, y in (run.rates(), (100 * m for m in run.mfu())))
        print(f"| {run.name} | {run.chips} | {run.rows} · {run.length} | {run.step_seconds():.3f} | {rates} | {mfu} |")


if __name__ == "__main__":
    main()
