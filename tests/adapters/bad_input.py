"""Mistakes, made on purpose in a running group, and the error that each rank saw."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from lcab_plugin import masks
from lcab_plugin.adapters import deepspeed as adapter
from lcab_plugin.context_parallel import collectives
from lcab_plugin.errors import LcabError
from lcab_plugin.planner import Workload
from tests.adapters.tiny_gpt import WIDTH, Case, DenseAttention, TinyGPT


def config(lcab: dict[str, Any] | None = None, **deepspeed: Any) -> dict[str, Any]:
    """A config for two ranks that share each sequence."""
    lcab = {"strategy": "ulysses", **(lcab or {})}
    return Case("", dp=1, lcab=lcab, deepspeed=deepspeed, stage=deepspeed.pop("stage", 0)).config()


def start(settings: Any, model: nn.Module | None = None, **options: Any) -> Any:
    model = TinyGPT() if model is None else model
    optimizer = options.pop("optimizer", torch.optim.SGD(model.parameters(), lr=0.1))
    return adapter.initialize(model=model, optimizer=optimizer, config=settings, **options)[0]


def on_last_rank(yes: Any, no: Any) -> Any:
    return yes if collectives.rank() == collectives.world_size() - 1 else no


def choose(**given: Any) -> Any:
    return start(config({"kernel": "auto", "strategy": "auto"}), **given)


def forward(heads: int = 4, tokens: int = 8, seqlen: int = 16) -> None:
    engine = start(config(), TinyGPT(heads=heads))
    x = torch.zeros(1, tokens, dtype=torch.int64)
    engine(x, torch.arange(tokens), masks.causal(seqlen))


def window(loss_masks: list[Any], act: Callable[[Any], object] = lambda w: None) -> None:
    act(start(config(gradient_accumulation_steps=2)).lcab.window(loss_masks))


def too_many(opened: Any) -> None:
    for _ in range(3):
        opened.loss(torch.ones(4))


def counted_otherwise(opened: Any) -> None:
    for _ in range(2):
        opened.loss(torch.ones(4), torch.tensor([1, 1, 0, 0]))
    opened.mean()


class Slot(nn.Module):
    """A DistributedAttention around ``local``."""

    def __init__(self, local: nn.Module, **options: Any) -> None:
        super().__init__()
        self.distributed = DistributedAttention(local, None, **{"scatter_idx": 2, "gather_idx": 1, **options})

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return self.distributed(q, k, v, 0, mask)


def ulysses(local: nn.Module | None = None, mask: str = "causal", **options: Any) -> Any:
    local = DenseAttention() if local is None else local
    return start(config({"layout": "contiguous", "mask": mask}), TinyGPT(lambda: Slot(local, **options)))


def ulysses_forward(mask: str, given: object) -> None:
    engine = ulysses(mask=mask)
    engine(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8), given)


def with_dropout() -> nn.Module:
    local = DenseAttention()
    local.attention_dropout = nn.Dropout(0.1)
    return local


def with_experts() -> nn.Module:
    model = TinyGPT()
    model.experts = MoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=2)
    return model


AUTO_LAYOUT = {"strategy": "ulysses", "layout": "auto"}
HALF = [torch.tensor([1, 0, 1, 0])] * 2
ZERO3 = {"stage": 3, "zero_optimization": {"reduce_scatter": False, "reduce_bucket_size": 1000}}

MISTAKES: dict[str, Callable[[], object]] = {
    "kernels differ": lambda: start(config({"kernel": on_last_rank("naive", "sdpa_math")})),
    "accumulation differs": lambda: start(config(gradient_accumulation_steps=on_last_rank(2, 1))),
    "one rank misspells": lambda: start(config({on_last_rank("kernal", "kernel"): "naive"})),
    "models differ": lambda: start(config(), TinyGPT(seqlen=on_last_rank(32, 64))),
    "unknown key": lambda: start(config({"kernal": "naive"})),
    "unknown kernel": lambda: start(config({"kernel": "sdpa_flsh"})),
    "unknown strategy": lambda: start(config({"strategy": "ulyses"})),
    "unknown layout": lambda: start(config({"layout": "zigzg"})),
    "unknown mask": lambda: start(config({"mask": "casual"})),
    "section is a list": lambda: start({**config(), "lcab": ["ulysses"]}),
    "world does not divide": lambda: start(config({"ulysses": 4})),
    "sequence_parallel_size differs": lambda: start(config({"ulysses": 2}, sequence_parallel_size=1)),
    "sequence_parallel_size without strategy": lambda: start(
        config({"strategy": "none"}, sequence_parallel_size=2)
    ),
    "sequence_parallel_size is text": lambda: start(config(sequence_parallel_size="auto")),
    "data_parallel_size differs": lambda: start(config(data_parallel_size=2)),
    "train_batch_size counts the world": lambda: start(
        config(train_batch_size=8, train_micro_batch_size_per_gpu=4)
    ),
    "batch does not divide": lambda: start(
        {
            **config(),
            "train_batch_size": 7,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": None,
        }
    ),
    "own mpu": lambda: start(config(), mpu=SimpleNamespace(get_sequence_parallel_world_size=lambda: 2)),
    "own mesh": lambda: start(config(), mesh_param=(1, 2)),
    "no config": lambda: start(None),
    "two configs": lambda: start(config(), args=SimpleNamespace(deepspeed_config="ds.json")),
    "no file": lambda: start("no/such/ds_config.json"),
    "no slot": lambda: start(config(), TinyGPT(DenseAttention)),
    "predivide": lambda: start(config(gradient_predivide_factor=2.0)),
    "small bucket": lambda: start(config(**ZERO3)),
    "experts": lambda: start(config(), with_experts()),
    "lamb": lambda: start(config(optimizer={"type": "Lamb"}), optimizer=None),
    "heads": lambda: forward(heads=1),
    "mask of another length": lambda: forward(seqlen=12),
    "number of micro-batches": lambda: window(on_last_rank(HALF[:1], HALF)),
    "weights for a mask": lambda: window([HALF[0], HALF[0] * 0.5]),
    "all masked": lambda: window([torch.zeros(4)] * 2),
    "too many losses": lambda: window(HALF, too_many),
    "shape of losses": lambda: window(HALF, lambda w: w.loss(torch.ones(5))),
    "losses for a count": lambda: window([2, 2], lambda w: w.loss(torch.ones(4))),
    "counted otherwise": lambda: window([2, 1], counted_otherwise),
    "attention dropout": lambda: ulysses(with_dropout()),
    "attention with parameters": lambda: ulysses(nn.Linear(2, 2)),
    "sequence first": lambda: ulysses(gather_idx=0),
    "DistributedAttention without layout": lambda: start(config(), TinyGPT(lambda: Slot(DenseAttention()))),
    "DistributedAttention with any layout": lambda: start(
        config(AUTO_LAYOUT),
        TinyGPT(lambda: Slot(DenseAttention())),
        workload=Workload(masks.causal(16), 4, 2, 8, "fp32"),
    ),
    "auto for nothing known": choose,
    "auto for other heads": lambda: choose(
        workload=Workload(masks.causal(16), on_last_rank(2, 4), 2, 8, "fp32")
    ),
    "auto without a kernel": lambda: start(
        config({"kernel": "auto", "softcap": 5.0}), workload=Workload(masks.causal(16), 4, 2, 8, "fp32")
    ),
    "family needs lengths": lambda: ulysses_forward("causal_document", None),
    "further arguments": lambda: ulysses_forward("causal", torch.ones(1)),
}


def errors(names: list[str]) -> dict[str, str]:
    """The message of each mistake's LcabError on this rank."""
    seen = {}
    for name in names:
        try:
            MISTAKES[name]()
        except LcabError as error:
            seen[name] = str(error)
        collectives.barrier()
    return seen
