"""The steps of a run around what a framework does in each: texts, records, display, validation."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError
from lcab_plugin.planner import Workload
from lcab_plugin.training import machine
from lcab_plugin.training.batch_mask import Window, with_mask
from lcab_plugin.training.data import PackedText, Text, batch_digest, open_corpus
from lcab_plugin.training.display import Progress
from lcab_plugin.training.evaluation import ByPosition, evaluate
from lcab_plugin.training.flops import mfu, peak_flops
from lcab_plugin.training.gpt import GPTConfig
from lcab_plugin.training.measure import StepTimer, summary
from lcab_plugin.training.memory import Meter
from lcab_plugin.training.recall import Recall
from lcab_plugin.training.records import RunLog, device_name, environment

WARM_UP = 2  # steps left out of a run's times


class Step(NamedTuple):
    """What one optimizer step came to."""

    loss: float  # mean of the unmasked tokens of the global batch
    loss_tokens: int  # their number
    grad_norm: float  # of the whole gradient, before clipping
    lr: float


class Trainer(Protocol):
    """A framework's part of a run."""

    device: torch.device
    parts: tuple[str, ...]  # of a step, timed one by one
    cp: int  # ranks that share a sequence

    def attentions(self) -> Iterable[nn.Module]:
        """The attention modules that the plug-in put into the model."""

    def read(self, step: int, text: Text) -> Window:
        """The micro-batches of ``text`` that this rank's data-parallel share of a step holds."""

    def step(self, window: Window, step: int, timer: StepTimer, gradients: Path | None) -> Step:
        """Train on them; ``gradients``: where to write the gradients of this step, {name: tensor}."""

    def tally(self, window: Window, cells: Sequence[Tensor], size: int) -> Tensor:
        """Without training, `evaluation.tally` of each token's `evaluation.scores` over all tokens of the
        global batch, on every rank; ``cells``: of each micro-batch of ``window``."""

    def save(self, directory: str, done: int) -> None:
        """Write a checkpoint after ``done`` steps."""


@dataclass(frozen=True)
class Job:
    """What a run is, whoever trains it."""

    args: argparse.Namespace
    model: GPTConfig
    global_batch: int
    dtype: str
    dp: int  # groups of ranks with samples of their own
    identity: Mapping[str, Any]  # what a run must have in common with the one that it continues
    facts: Mapping[str, Any]  # of the first record, besides those above
    texts: tuple[PackedText, PackedText]  # for training and for validation
    first_step: int = 0
    messages: Sequence[str] = ()  # shown first


def open_texts(args: argparse.Namespace) -> tuple[PackedText, PackedText]:
    """The texts for training and validation.

    Raises:
        LcabError: on every rank, where one cannot read them.
    """
    corpora = collectives.together(lambda: open_corpus(args.data, args.vocab).split())
    options = {"seed": args.seed, "doc_lengths": args.doc_lengths, "loss_mask": args.loss_mask}
    text, validation_text = (PackedText(corpus, args.seqlen, **options) for corpus in corpora)
    return text, validation_text


def workload(text: PackedText, model: GPTConfig, family: str, dtype: str, tp: int = 1) -> Workload:
    """What ``"auto"`` is decided for: the model's attention on the first sample of ``text``, with the heads
    of one of ``tp`` tensor-parallel ranks."""
    _, mask = with_mask(text.batch([0]), family)
    return Workload(mask, model.heads // tp, model.kv_heads // tp, model.head_dim, dtype, "the first sample")


def identity(
    args: argparse.Namespace, model: GPTConfig, global_batch: int, text: PackedText
) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it continues."""
    return {
        "model": asdict(model),
        "global_batch": global_batch,
        "data_digest": text.corpus.digest,
        **{key: getattr(args, key) for key in ("seqlen", "doc_lengths", "loss_mask", "seed")},
    }


def require_same_run(
    args: argparse.Namespace, identity: Mapping[str, Any], saved: Mapping[str, Any] | None
) -> int:
    """The steps that the checkpoint in ``--resume`` has done; ``saved``: its ``{"step", "identity"}``.

    Raises:
        LcabError: there is none, it is of another run, or it has done all ``--steps``.
    """
    if saved is None:
        raise LcabError(f"--resume {args.resume} holds no checkpoint; give the folder that --save wrote.")
    for key, value in identity.items():
        if (before := saved.get("identity", {}).get(key)) != value:
            raise LcabError(f"--resume {args.resume} has {key} {before}, this run {value}.")
    if saved["step"] >= args.steps:
        raise LcabError(
            f"--resume {args.resume} has done {saved['step']} steps; give more --steps than that."
        )
    return saved["step"]


def warm(step: int, steps: int) -> float:
    """The share of the learning rate at a step: it rises over ``steps`` steps and stays."""
    return min(1.0, (step + 1) / max(1, steps))


def run(trainer: Trainer, job: Job) -> None:
    """Train from ``job.first_step`` to ``--steps``; records go to ``--out``. Ctrl-C ends it with status 130.

    Matrix products are added up in float32 from here on. PyTorch lets cuBLAS add the parts of one that it
    splits up in bf16 or fp16, and which ones it splits depends on how many tokens a rank has: on two H200s
    losses of the first ten steps lay 0.4 to 3.2 times as far from those of one GPU as that from float32,
    added up in float32 0.3 to 0.9 times, at no cost seen (docs/results/2026-11-30-2xh200-float32).

    Raises:
        LcabError: the records cannot be written, ``--recall`` finds no room, or the loss is no number any
            more.
    """
    product = torch.backends.cuda.matmul
    product.allow_bf16_reduced_precision_reduction = product.allow_fp16_reduced_precision_reduction = False
    args = job.args
    name = args.name or f"{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, leads = Path(args.out, name, "metrics.jsonl"), collectives.rank() == 0
    facts = {"name": name, "steps": args.steps, "first_step": job.first_step, **job.facts}
    facts |= {**job.identity, "parameters": job.model.parameters}
    recall = collectives.together(lambda: _recall(job))
    log = collectives.together(lambda: RunLog(path, append=bool(args.resume), enabled=leads))
    with log, Progress(args.steps, start=job.first_step, enabled=leads) as progress:
        for line in job.messages:
            progress.message(line)
        progress.message(f"records: {path}")
        log.write("run", **facts, **environment(trainer.device))
        try:
            end = _train(trainer, job, log, progress)
            if recall is not None:
                end["recall"] = evaluate(trainer, recall, -(-args.recall // job.global_batch))
                progress.message(f"recalled at distance {_shares(end['recall'])}")
        except KeyboardInterrupt:
            saved = f", checkpoints: {args.save}; --resume goes on from the latest" if args.save else ""
            progress.message(f"stopped; records: {path}{saved}")
            raise SystemExit(130) from None
        log.write("end", **end, machine=machine.state(trainer.device))
        final = "" if end["validation_loss"] is None else f", validation loss {end['validation_loss']:.4f}"
        progress.message(f"train loss {end['loss']:.4f}{final}; records: {path}")


def _train(trainer: Trainer, job: Job, log: RunLog, progress: Progress) -> dict[str, Any]:
    """All steps; returns what the last record says of them."""
    args, validation = job.args, ByPosition(job.texts[1])
    meter = Meter(trainer.device, trainer.attentions(), trainer.cp)
    timer = StepTimer(trainer.device, ("data", "step", *trainer.parts), meter.ended)
    times: dict[str, list[float]] = {}
    validation_loss = None
    untimed = min(WARM_UP, args.steps - job.first_step - 1)
    for step in range(job.first_step, args.steps):
        with timer("data"):
            window = trainer.read(step, job.texts[0])
        meter.begin(timed=step - job.first_step >= max(1, untimed))
        with timer("step"):
            gradients = args.save_gradients if step == job.first_step else None
            done = trainer.step(window, step, timer, gradients)
        took = _measure(trainer, job, window, timer.take(), meter)
        for part in ("data", "step", *trainer.parts):
            times.setdefault(part, []).append(took[f"{part}_ms"])
        log.write("step", step=step, **done._asdict(), **took)
        progress.update(done.loss, took["tokens_per_s"], took["step_ms"], took["peak_memory_gib"])
        if not math.isfinite(done.loss):
            raise LcabError(f"the loss of step {step} is {done.loss}; lower --lr or raise --warmup.")
        if _due(step, args.eval_every, args) and args.eval_batches:
            found = evaluate(trainer, validation, args.eval_batches)
            validation_loss = found["loss"]
            log.write("eval", step=step, **found)
            progress.message(f"step {step + 1}: validation loss {validation_loss:.4f}")
        if _due(step, args.save_every, args) and args.save:
            trainer.save(args.save, step + 1)
    memories = collectives.all_gather_object(meter.record())
    return {
        "step": step,
        "loss": done.loss,
        "validation_loss": validation_loss,
        "times": {part: summary(taken[untimed:]).record() for part, taken in times.items()},
        "warm_up_steps": untimed,
        "memory": {key: [memory[key] for memory in memories] for key in memories[0]},
    }


def _recall(job: Job) -> Recall | None:
    """The task of ``--recall``, in the validation text."""
    args = job.args
    if not args.recall:
        return None
    recall = Recall(job.texts[1].corpus, args.seqlen, args.recall, args.seed)
    recall.batch(range(args.recall))  # what is wrong with the text is said before the first step
    return recall


def _shares(recall: Mapping[str, Any]) -> str:
    pairs = zip(recall["distance"], recall["accuracy"], strict=True)
    return ", ".join(f"{distance}: {accuracy:.0%}" for distance, accuracy in pairs)


def _due(step: int, every: int, args: argparse.Namespace) -> bool:
    """Whether something is to be done after this step: every so many, and after the last."""
    return step + 1 == args.steps or (every > 0 and (step + 1) % every == 0)


def _measure(
    trainer: Trainer, job: Job, window: Window, times: Mapping[str, float], meter: Meter
) -> dict[str, Any]:
    """What a step took: time of the slowest rank, memory of the fullest, work of all together."""
    took = {**times, "peak_memory_gib": meter.peak_gib()}
    most = torch.tensor(list(took.values()), dtype=torch.float64, device=trainer.device)
    took = dict(zip(took, collectives.all_reduce_max(most).tolist(), strict=True))
    shares = collectives.all_gather_object((window.digests, window.area))
    tokens, seconds, world = job.global_batch * job.args.seqlen, took["step_ms"] / 1e3, len(shares)
    flops = job.model.flops(tokens, sum(area for _, area in shares) * job.dp // world)
    peak = peak_flops(device_name(trainer.device), job.dtype)
    return took | {
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "model_tflops": flops / 1e12,
        "mfu": mfu(flops, seconds, world, peak),
        "batch_digest": batch_digest(digests for digests, _ in shares),
    }


def save_whole(gradients: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write {name: float32 tensor}, on the first rank."""
    if collectives.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: gradient.float().cpu() for name, gradient in gradients.items()}, path)
