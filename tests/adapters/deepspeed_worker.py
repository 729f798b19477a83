"""One rank of the DeepSpeed tests: ``deepspeed_worker.py FUNCTION INPUT.json OUTPUT`` runs that function and
saves this rank's answer to OUTPUT.RANK. Started by any launcher, or alone."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from lcab_plugin import masks
from lcab_plugin.adapters import deepspeed as adapter
from lcab_plugin.context_parallel import collectives
from lcab_plugin.planner import Workload
from tests.adapters import bad_input
from tests.adapters.tiny_gpt import (
    HEADS,
    KV_HEADS,
    LEARNING_RATE,
    WIDTH,
    Case,
    DenseAttention,
    Result,
    initial_model,
    per_token_loss,
    window,
)


class Ulysses(nn.Module):
    """DeepSpeed's own Ulysses slot, as an existing model has it."""

    def __init__(self) -> None:
        super().__init__()
        self.distributed = DistributedAttention(DenseAttention(), None, scatter_idx=2, gather_idx=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return self.distributed(q, k, v, 0)


def train(case: Case) -> Result:
    """Train ``case`` on this rank through the adapter."""
    model = initial_model(Ulysses) if case.distributed_attention else initial_model()
    if collectives.rank():
        for parameter in model.parameters():  # the weights of rank 0 must arrive here
            nn.init.normal_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    workload = Workload(masks.causal(case.seqlen), HEADS, KV_HEADS, WIDTH // HEADS, case.dtype)
    engine, *_ = adapter.initialize(model=model, optimizer=optimizer, config=case.config(), workload=workload)
    assert (engine.lcab.config.chosen is not None) == ("auto" in case.lcab.values())
    result = train_engine(engine, case)
    engine.destroy()
    return result


def train_engine(engine: Any, case: Case) -> Result:
    """The steps of ``case`` on an engine."""
    lcab, each = engine.lcab, case.batch // case.dp
    assert lcab.dp_size == case.dp
    rows = slice(lcab.dp_rank * each, (lcab.dp_rank + 1) * each)
    losses, norms = [], []
    for step in range(case.steps):
        micros = window(case, step)
        layouts = [lcab.cp.with_layout(mask=m.mask) for m in micros]
        shards = [
            [cp.shard(x[rows], dim=1) for x in (m.tokens, m.labels, m.loss_mask)]
            for cp, m in zip(layouts, micros, strict=True)
        ]
        accumulated = lcab.window([loss_mask for _, _, loss_mask in shards])
        assert accumulated.tokens == sum(int(m.loss_mask.sum()) for m in micros)
        for cp, m, (tokens, labels, loss_mask) in zip(layouts, micros, shards, strict=True):
            per_token = per_token_loss(engine(tokens, cp.positions(), m.mask), labels)
            if step % 2:  # the two ways to hand losses over
                loss = accumulated.loss(per_token, loss_mask)
            else:
                loss = accumulated.loss(per_token[loss_mask].sum(), count=loss_mask.sum())
            engine.backward(loss * case.tamper)
            engine.step()
        losses.append(accumulated.mean())
        norms.append(float(engine.get_global_grad_norm()))
    return Result(losses, norms, full_parameters(engine, case))


def full_parameters(engine: Any, case: Case) -> dict[str, Tensor]:
    """Whole float32 parameters by name; in bf16 the optimizer's copies."""
    named = list(engine.module.named_parameters())
    if case.dtype == "bf16" and case.stage == 0:
        (copies,) = engine.optimizer.fp32_groups
        return {name: copy.detach().clone() for (name, _), copy in zip(named, copies, strict=True)}
    full = safe_get_full_fp32_param if case.dtype == "bf16" or case.stage == 3 else torch.clone
    return {name: full(p).detach() for name, p in named}


def train_all(cases: list[dict[str, Any]]) -> dict[str, Result]:
    """Every case in turn, in one process group."""
    return {fields["name"]: train(Case(**fields)) for fields in cases}


def train_from_file(fields: dict[str, Any]) -> dict[str, Any]:
    """A case whose config is a file named on the command line, with the optimizer of the config."""
    case = Case(**fields)
    path = Path(os.environ["DS_CONFIG"])
    path.write_text(json.dumps(case.config()))
    args = argparse.Namespace(deepspeed_config=str(path), local_rank=-1)
    model = initial_model()
    engine, optimizer, loader, scheduler = adapter.initialize(
        args=args, model=model, model_parameters=model.parameters()
    )
    assert optimizer is engine.optimizer
    assert (loader, scheduler) == (None, None)
    assert (args.deepspeed_config, args.local_rank) == (str(path), int(os.environ["LOCAL_RANK"]))
    return {
        "result": train_engine(engine, case),
        "optimizer": type(engine.basic_optimizer).__module__ + "." + type(engine.basic_optimizer).__name__,
        "slots": engine.lcab.slots,
        "world": collectives.world_size(),
    }


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "train_all": train_all,
    "train_from_file": train_from_file,
    "errors": bad_input.errors,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("function", choices=FUNCTIONS)
    parser.add_argument("input", type=Path)
    parser.add_argument("output")
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    adapter.init_distributed()
    answer = FUNCTIONS[args.function](json.loads(args.input.read_text()))
    torch.save(answer, f"{args.output}.{os.environ['RANK']}")


if __name__ == "__main__":
    main()
