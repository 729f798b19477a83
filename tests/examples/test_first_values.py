"""In bf16 the examples train from the float32 first values, not from what bf16 keeps of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcab_plugin.bench.launch import launch

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--layers",
    "2",
    "--hidden",
    "64",
    "--ffn",
    "128",
    "--seqlen",
    "64",
    "--steps",
    "1",
    "--dtype",
    "bf16",
]

DEEPSPEED = """
import torch, train_gpt
from deepspeed.utils import safe_get_full_fp32_param

trainer, job = train_gpt.prepare(train_gpt.parse_args())
for name, parameter in trainer.engine.module.named_parameters():
    first = job.model.initial(name, job.args.seed)
    assert torch.equal(safe_get_full_fp32_param(parameter), first), name
"""

ROUNDED = """
import train_gpt

_, job = train_gpt.prepare(train_gpt.parse_args())
assert any("begin rounded" in line for line in job.messages), job.messages
"""

MEGATRON = """
import torch, train_gpt_megatron as example
from lcab_plugin.context_parallel import collectives

gpt = example.gpt_in_megatron
trainer, job = example.prepare(example.parse_args())
degrees = example.parallel_state.get_tensor_model_parallel_rank(), job.args.tensor_parallel
first = []
for name, parameter in example.named_parameters(trainer.part):
    first.append(gpt.to_megatron(name, job.model, job.args.seed, *degrees))
    assert torch.equal(parameter, first[-1].bfloat16()), name
own = [value for inner in trainer.inner_optimizers() for value in gpt.masters(inner)]
if job.args.distributed_optimizer:
    own = [value for values in collectives.all_gather_object(own) for value in values]
masters, exact = (torch.cat([x.detach().flatten() for x in values]).sort().values for values in (own, first))
assert torch.equal(masters, exact)
"""


@pytest.mark.parametrize(
    ("framework", "flags"),
    [
        ("deepspeed", ["--deepspeed_config", str(ROOT / "examples" / "configs" / "zero1.json")]),
        ("deepspeed", ["--deepspeed_config", str(ROOT / "examples" / "configs" / "zero3.json")]),
        ("rounded", ["--deepspeed_config", str(ROOT / "examples" / "configs" / "zero0.json")]),
        ("megatron", ["--tensor-parallel", "2", "--vocab", "258"]),
        ("megatron", ["--distributed-optimizer"]),
    ],
)
def test_an_optimizer_begins_exactly_or_says_that_it_does_not(
    tmp_path: Path, framework: str, flags: list[str]
) -> None:
    pytest.importorskip("megatron" if framework == "megatron" else "deepspeed")
    script = tmp_path / "first_values.py"
    paths = [str(ROOT / "examples"), str(ROOT)]
    code = {"deepspeed": DEEPSPEED, "rounded": ROUNDED, "megatron": MEGATRON}[framework]
    script.write_text(f"import sys\nsys.path[:0] = {paths}\n{code}")
    arguments = [*SMALL, *flags, "--out", str(tmp_path)]
    outcome = launch(script, arguments, world=2, device="cpu", logs=tmp_path / "logs", timeout=120)
    assert outcome.status == "done", outcome.reason
