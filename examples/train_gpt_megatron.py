"""Train the GPT of train_gpt.py on real text through Megatron-core, its attention by the plug-in.

    python examples/train_gpt_megatron.py                                     # preset tiny, one process
    torchrun --nproc-per-node 2 examples/train_gpt_megatron.py --strategy ring_p2p
    torchrun --nproc-per-node 2 examples/train_gpt_megatron.py --kernel auto --strategy auto
    torchrun --nproc-per-node 8 examples/train_gpt_megatron.py --preset 1b --vocab 258 \\
        --tensor-parallel 2 --sequence-parallel --strategy ulysses --distributed-optimizer

Context parallelism takes the ranks that the degrees name, else all that tensor and pipeline parallelism
leave; what remains is data parallel. Without a GPU it runs on the CPU. Records go to
runs/<name>/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from lcab_plugin import kernels, layout
from lcab_plugin.adapters import megatron as lcab_megatron
from lcab_plugin.adapters.megatron import cpu
from lcab_plugin.config import AttentionConfig
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError
from lcab_plugin.masks import AttentionMask
from lcab_plugin.training import arguments, evaluation, gpt_in_megatron, loop
from lcab_plugin.training.batch_mask import Window, read_window
from lcab_plugin.training.data import Text, window_samples
from lcab_plugin.training.gpt import NORM_EPSILON, RATES, ROPE_BASE, GPTConfig
from lcab_plugin.training.measure import StepTimer
from lcab_plugin.training.settings import ATTENTION

TIMEOUT = 1800.0  # seconds that a rank waits for another
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},  # attention alone
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
TRACKER = "latest_checkpointed_iteration.txt"


class RMSNorm(nn.RMSNorm):
    """Megatron's own, without TransformerEngine, refuses sequence parallelism, where every tensor-parallel
    rank norms other tokens: Megatron sums the gradients of weights marked as here."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def transformer_config(args: argparse.Namespace, model: GPTConfig, cp: int) -> TransformerConfig:
    """The GPT of train_gpt.py in Megatron's words."""
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=NORM_EPSILON,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        context_parallel_size=cp,
        sequence_parallel=args.sequence_parallel,
        bf16=args.dtype == "bf16",
        params_dtype=DTYPES[args.dtype],
        pipeline_dtype=DTYPES[args.dtype],
        # The mean over all unmasked tokens of the global batch. Without it Megatron averages the means of
        # ranks and micro-batches, whatever number of tokens each has.
        calculate_per_token_loss=True,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,  # apex's
        persist_layer_norm=False,
        finalize_model_grads_func=finalize_model_grads,
        **RECOMPUTE[args.recompute],
    )


def build(
    args: argparse.Namespace, model: GPTConfig, config: TransformerConfig, attention: AttentionConfig
) -> tuple[GPTModel, list[tuple[nn.Parameter, Tensor]]]:
    """This rank's part of the model, with the plug-in's attention, and its parameters with the first values
    of train_gpt.py, which they have as well as their precision allows."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    layers = [layer] * (model.layers // args.pipeline_parallel)
    spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    part = GPTModel(
        config,
        lcab_megatron.swap_core_attention(spec, attention),
        vocab_size=model.vocab,
        max_sequence_length=args.seqlen,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=ROPE_BASE,
        share_embeddings_and_output_weights=False,
    )
    part.to(device())
    degrees = parallel_state.get_tensor_model_parallel_rank(), args.tensor_parallel
    return part, gpt_in_megatron.fill(named_parameters(part), model, args.seed, *degrees)


def named_parameters(part: GPTModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of this rank, their layers counted over all pipeline stages."""
    first_layer = part.decoder.layers[0].layer_number - 1
    for name, parameter in part.named_parameters():
        yield gpt_in_megatron.global_name(name, first_layer), parameter


class Shard(NamedTuple):
    """This rank's rows of one micro-batch, [b, t], under the mask of the whole sequence. Marks say which
    tokens count, or into which cell each falls."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    marks: Tensor
    mask: AttentionMask


Report = Callable[[Shard, Tensor], tuple[Tensor, Tensor, Tensor]]


def forward_step(
    timer: Callable[[str], Any], report: Report, shards: Iterator[Shard], model: nn.Module
) -> tuple[Tensor, Any]:
    """What Megatron's schedule calls for each micro-batch: this stage's output, and what the last stage makes
    of it: a loss, its number of tokens, and what the schedule returns."""
    shard = next(shards)
    mask, labels = lcab_megatron.mask_params(shard.mask), shard.labels if model.training else None
    with timer("forward"):
        output = model(shard.tokens, shard.positions, None, labels=labels, packed_seq_params=mask)
    return output, partial(report, shard)


def summed_loss(shard: Shard, per_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over this rank's unmasked tokens, their number, and both for the record."""
    total, tokens = per_token.float().where(shard.marks, 0.0).sum(), shard.marks.count_nonzero()
    return total, tokens.int(), torch.stack((total.detach().double(), tokens.double()))


def tallied(size: int, shard: Shard, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tally of this rank's tokens in ``size`` cells; ``logits [b, t, vocabulary / tp]``."""
    group = parallel_state.get_tensor_model_parallel_group()
    totals = evaluation.tally(evaluation.scores(logits.float(), shard.labels, group), shard.marks, size)
    return totals[:, 0].sum(), totals[:, 2].sum().int(), totals


class Trainer:
    """One run: this rank's part of the model, and Megatron's optimizer over it."""

    parts = ("schedule", "forward", "optimizer")  # the schedule interleaves forward and backward passes

    def __init__(
        self, args: argparse.Namespace, model: GPTConfig, part: GPTModel, attention: AttentionConfig
    ) -> None:
        self.args, self.model, self.part, self.attention = args, model, part, attention
        self.device, self.cp = device(), part.config.context_parallel_size
        self.identity: dict[str, Any] = {}
        self.dp = parallel_state.get_data_parallel_world_size()
        self.replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        config = part.config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=args.overlap_grad_reduce,
            use_distributed_optimizer=args.distributed_optimizer,
        )
        wrapped = Float16Module(config, part) if config.bf16 else part
        self.ddp = DistributedDataParallel(config, ddp_config, wrapped)
        if args.overlap_grad_reduce:
            config.no_sync_func = self.ddp.no_sync
        settings = OptimizerConfig(
            optimizer={"adamw": "adam", "sgd": "sgd"}[args.optimizer],
            lr=args.lr,
            weight_decay=args.weight_decay,
            adam_beta1=0.9,
            adam_beta2=0.95,
            sgd_momentum=0.0,
            clip_grad=args.clip or float("inf"),  # for 0 Megatron does not measure the norm
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=args.distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.ddp])

    def attentions(self) -> list[nn.Module]:
        """The modules that the plug-in put into this part."""
        return [module for module in self.part.modules() if isinstance(module, lcab_megatron.CoreAttention)]

    def read(self, step: int, text: Text) -> Window:
        """The samples of this data-parallel rank, whole."""
        sizes, rank = (self.args.global_batch, self.args.micro_batch), parallel_state.get_data_parallel_rank()
        samples = window_samples(step, *sizes, rank, self.dp)
        return read_window(text, self.attention.mask, samples)

    def run_schedule(
        self, window: Window, marks: Sequence[Tensor], step: partial[tuple[Tensor, Any]], *shape: int
    ) -> Tensor:
        """Megatron's schedule over the micro-batches, each marked; the sum of what the last stage reports,
        of that shape, over all ranks."""
        rank, shards = parallel_state.get_context_parallel_rank(), []
        for (batch, mask), marked in zip(window.batches, marks, strict=True):
            cut = layout.make("zigzag", self.cp, mask.q_len)
            rows = (batch.tokens, batch.labels, batch.positions, marked)
            shards.append(Shard(*(cut.shard(x, rank, dim=1).to(self.device) for x in rows), mask))
        batch, mask = window.batches[0]
        with lcab_megatron.keep_attention() if self.args.keep_attention else nullcontext():
            reports = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(shards),
                model=[self.ddp],
                num_microbatches=len(shards),
                seq_length=mask.q_len,
                micro_batch_size=len(batch.tokens),
                forward_only=not self.ddp.training,
            )
        total = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if reports and parallel_state.get_tensor_model_parallel_rank() == 0:  # the last stage's
            total += torch.stack(reports).sum(0)
        return collectives.all_reduce_sum(total)

    def step(self, window: Window, step: int, timer: StepTimer, gradients: Path | None) -> loop.Step:
        """One optimizer step."""
        rate = self.args.lr * loop.warm(step, self.args.warmup)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        marks = [batch.loss_mask for batch, _ in window.batches]
        with timer("schedule"):
            forward = partial(forward_step, timer, summed_loss)
            total, tokens = self.run_schedule(window, marks, forward, 2).tolist()
        if gradients is not None:
            self.save_gradients(gradients)
        with timer("optimizer"):
            for group in self.optimizer.param_groups:  # norms decay as well, as in train_gpt.py
                group["lr"], group["weight_decay"] = rate, self.args.weight_decay
            _, norm, _ = self.optimizer.step()
        return loop.Step(total / tokens if tokens else float("nan"), int(tokens), float(norm), rate)

    @torch.no_grad()
    def tally(self, window: Window, cells: Sequence[Tensor], size: int) -> Tensor:
        """Losses, hits and tokens of every cell, over all ranks."""
        self.ddp.eval()
        forward = partial(forward_step, nullcontext, partial(tallied, size))
        totals = self.run_schedule(window, cells, forward, size, 3)
        self.ddp.train()
        return totals

    def save_gradients(self, path: Path) -> None:
        """Write all gradients, averaged over all tokens, whole and not clipped, by train_gpt.py's names."""
        if self.args.distributed_optimizer:  # each replica has reduced a part of every bucket
            for buffer in self.ddp.buffers:
                for bucket in buffer.buckets:
                    own = bucket.grad_data.chunk(collectives.world_size(self.replicas))
                    gathered = collectives.all_gather(own[collectives.rank(self.replicas)], self.replicas)
                    bucket.grad_data.copy_(gathered.flatten())
        held = {name: parameter.main_grad.cpu() for name, parameter in named_parameters(self.part)}
        own = parallel_state.get_tensor_model_parallel_rank(), held
        sent = own if collectives.rank(self.replicas) == 0 and collectives.rank() else None  # GiB each
        others = [part for part in collectives.all_gather_object(sent) if part]
        if collectives.rank() == 0:
            loop.save_whole(gpt_in_megatron.merge([own, *others], self.model), path)

    def files(self, directory: str, done: int) -> tuple[Path, Path]:
        """This rank's part of the model, the same for all its replicas, and its part of the optimizer."""
        tp = parallel_state.get_tensor_model_parallel_rank()
        pp = parallel_state.get_pipeline_model_parallel_rank()
        shard = collectives.rank(self.replicas) if self.args.distributed_optimizer else 0
        name = Path(directory, f"step{done}", f"tensor{tp}_pipeline{pp}")
        return name.with_suffix(".pt"), name.with_name(f"{name.name}_optimizer{shard}.pt")

    def inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that Megatron's wraps. Their parameters are float32, with bf16 copies of the model's."""
        return [wrapper.optimizer for wrapper in self.optimizer.chained_optimizers]

    def save(self, directory: str, done: int) -> None:
        """Write with torch.save what each rank holds and no other rank has written.

        Not Megatron's own formats, which leave out a part of the state of torch's AdamW: tensor and pipeline
        degrees, and the number of optimizer shards, must be the same when the run is resumed.
        """
        model, optimizer = self.files(directory, done)
        model.parent.mkdir(parents=True, exist_ok=True)
        first = collectives.rank(self.replicas) == 0
        if first:
            state = {"step": done, "identity": self.identity, "model": self.part.state_dict()}
            torch.save(state, model)
        if first or self.args.distributed_optimizer:
            states = [
                (inner.state_dict(), gpt_in_megatron.masters(inner)) for inner in self.inner_optimizers()
            ]
            torch.save(states, optimizer)
        collectives.barrier()  # the checkpoint is the latest when it is whole
        if collectives.rank() == 0:
            Path(directory, TRACKER).write_text(str(done))

    @torch.no_grad()
    def resume(self) -> int:
        """Load the latest checkpoint; returns the steps it has done."""
        tracker, state = Path(self.args.resume, TRACKER), None
        if tracker.is_file():
            model, optimizer = self.files(self.args.resume, int(tracker.read_text()))
            state = torch.load(model, map_location="cpu", weights_only=True) if model.is_file() else None
        done = collectives.together(lambda: loop.require_same_run(self.args, self.identity, state))
        self.part.load_state_dict(state["model"])
        saved = torch.load(optimizer, map_location="cpu", weights_only=True)
        for inner, (inner_state, values) in zip(self.inner_optimizers(), saved, strict=True):
            inner.load_state_dict(inner_state)
            for parameter, value in zip(gpt_in_megatron.masters(inner), values, strict=True):
                parameter.copy_(value)
        return done


def device() -> torch.device:
    """This rank's."""
    return torch.device(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")


def join(args: argparse.Namespace, attention: AttentionConfig) -> int:
    """Meet the other ranks and make Megatron's groups; returns the number of context-parallel ranks."""
    if "WORLD_SIZE" not in os.environ:  # no launcher
        collectives.describe_world_of_one(os.environ)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        collectives.join("nccl", TIMEOUT)
    else:
        collectives.join("gloo", TIMEOUT)
        cpu.install()
    tp, pp, world = args.tensor_parallel, args.pipeline_parallel, collectives.world_size()
    cp = 1 if attention.strategy == "none" else attention.cp_size or max(1, world // (tp * pp))
    if world % (tp * pp * cp):
        raise LcabError(
            f"{world} ranks do not divide by --tensor-parallel {tp} x --pipeline-parallel {pp} x {cp} "
            "context-parallel ranks; start a multiple of their product"
        )
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp)
    model_parallel_cuda_manual_seed(args.seed)
    return cp


def prepare(args: argparse.Namespace) -> tuple[Trainer, loop.Job]:
    """Make the groups, read the text, build the model and its optimizer, load a checkpoint."""
    given = {key: getattr(args, key) for key in ATTENTION if getattr(args, key) is not None}
    attention = AttentionConfig.from_dict({"mask": "causal_document", **given})
    cp = join(args, attention)
    texts = loop.open_texts(args)
    model = arguments.model_config(args, texts[0].corpus.vocab)
    tp, pp = args.tensor_parallel, args.pipeline_parallel
    gpt_in_megatron.require_degrees(model, args.seqlen, tp, pp, cp, args.sequence_parallel)
    if attention.undecided:
        workload = loop.workload(texts[0], model, attention.mask, args.dtype, tp)
        attention = collectives.together(lambda: lcab_megatron.decided(attention, workload, cp, tp))
    part, first = build(args, model, transformer_config(args, model, cp), attention)
    trainer = Trainer(args, model, part, attention)
    if args.dtype == "bf16":
        gpt_in_megatron.begin_exactly(trainer.optimizer, first)
    slots = collectives.all_gather_object(lcab_megatron.describe(part))
    plugged = trainer.attentions()[0].plug.cp
    facts = {
        "framework": "megatron",
        "data": texts[0].corpus.facts(),
        "attention": attention.to_dict(),
        "auto": attention.chosen and attention.chosen.record,
        "kernel_version": kernels.get(attention.kernel).version(),
        "strategy": plugged.describe(),
        "degrees": plugged.degrees,
        "slots": slots[0],
        "world": collectives.world_size(),
        **{"dp": trainer.dp, "cp": cp, "tp": tp, "pp": pp},
        "accumulation_steps": args.global_batch // (args.micro_batch * trainer.dp),
        **{key: getattr(args, key) for key in ("dtype", "micro_batch", "recompute", "keep_attention")},
        **{key: getattr(args, key) for key in ("sequence_parallel", "overlap_grad_reduce")},
        **{key: getattr(args, key) for key in ("optimizer", "lr", "weight_decay", "clip", "warmup")},
    }
    shards = collectives.world_size(trainer.replicas) if args.distributed_optimizer else 1
    trainer.identity = loop.identity(args, model, args.global_batch, texts[0])
    trainer.identity |= {"tensor_parallel": tp, "pipeline_parallel": pp, "optimizer_shards": shards}
    first_step = trainer.resume() if args.resume else 0
    lines = [f"lcab_plugin: {line}" for line in slots[0]]
    rest = trainer.dp, trainer.identity, facts, texts, first_step, lines
    return trainer, loop.Job(args, model, args.global_batch, args.dtype, *rest)


def parse_args() -> argparse.Namespace:
    """Flags, with the preset's sizes where they were left out."""
    parser = arguments.parser(__doc__)
    group = parser.add_argument_group("training")
    arguments.add_training(group)
    dtype = "bf16" if torch.cuda.is_available() else "fp32"
    parser.set_defaults(global_batch=8, micro_batch=1, dtype=dtype, optimizer="adamw")
    parser.set_defaults(weight_decay=0.1, clip=1.0)  # as configs/zero1.json
    add = parser.add_argument_group("parallelism").add_argument
    add("--tensor-parallel", type=arguments.positive, default=1, metavar="N", help="(%(default)s)")
    add("--pipeline-parallel", type=arguments.positive, default=1, metavar="N", help="stages (%(default)s)")
    add("--sequence-parallel", action="store_true", help="norms over the tensor-parallel ranks")
    add("--distributed-optimizer", action="store_true", help="its state over the data-parallel ranks")
    add("--overlap-grad-reduce", action="store_true", help="reduce gradients during the backward pass")
    add("--recompute", choices=RECOMPUTE, default="none", help="in the backward pass (%(default)s)")
    add("--keep-attention", action="store_true", help="recompute full, but attention not")
    arguments.add_attention(parser.add_argument_group("attention"))
    arguments.add_run(parser)
    args = arguments.parse(parser)
    if args.lr is None:
        args.lr = RATES[args.preset]
    if args.dtype not in DTYPES:
        parser.error(f"--dtype {args.dtype} needs a loss scale, which this script has not: give bf16 or fp32")
    if args.keep_attention and args.recompute != "full":
        parser.error("--keep-attention says what --recompute full leaves out: give both")
    return args


if __name__ == "__main__":
    try:
        loop.run(*prepare(parse_args()))
    except LcabError as error:
        sys.exit(f"train_gpt_megatron.py: {error}")
    collectives.leave()
