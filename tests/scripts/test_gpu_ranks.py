"""Training runs of one process, one after the other: what one leaves for the next, when all begin anew."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lcab_plugin.bench.launch import launch
from lcab_plugin.context_parallel import collectives
from lcab_plugin.training import records
from tests.distributed import free_port, run

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"

STAYS = """
import gc, os, sys
from pathlib import Path
import training_ranks

script, out, zero = sys.argv[1:]
module = training_ranks.load(Path(script))
training_ranks.prepare_quickly(module)
config = Path(script).parent / "configs" / f"zero{zero}.json"
flags = ["--seqlen", "64", "--steps", "2", "--global-batch", "1", "--eval-batches", "0", "--out", out]
for name in ("first", "second"):
    sys.argv = [script, *flags, "--deepspeed_config", str(config), "--name", name]
    trainer, job = module.prepare(module.parse_args())
    module.loop.run(trainer, job)
    training_ranks.leave(module, trainer)
    del trainer, job
    training_ranks.crowded(0.2)
    print("models:", sum(isinstance(x, module.GPT) for x in gc.get_objects()), flush=True)
os._exit(0)  # the process group is left as it is
"""


@pytest.mark.parametrize(
    ("ranks", "crowded"),
    [
        ([(1.5, 0.2)], False),
        ([(1.5, 0.2), (21.0, 0.2)], True),
        ([(1.5, 1.2), (1.5, 0.2)], True),  # tensors, which the next run's peak would count
    ],
)
def test_what_makes_ranks_start_anew(monkeypatch, ranks, crowded):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("training_ranks")
    of_ranks = [(occupied * 2**30, left * 2**30) for occupied, left in ranks]
    own = {"is_available": True, "empty_cache": None, "mem_get_info": (0, 100 * 2**30), "memory_allocated": 0}
    for name, value in own.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    forgotten = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: forgotten.append("peak"))
    monkeypatch.setattr(collectives, "all_gather_object", lambda mine: of_ranks)
    assert module.crowded(0.2) == crowded
    assert forgotten, "the next run's peak memory would be that of the end of this one"


@pytest.mark.parametrize("zero", [1, 3])
def test_a_run_leaves_no_model_behind(tmp_path, zero):
    """What it left would count in the peak memory of the next run of the same process."""
    pytest.importorskip("deepspeed")
    script = SCRIPTS.parents[1] / "examples" / "train_gpt.py"
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", STAYS, script, tmp_path, str(zero)],
        env={**os.environ, **ranks, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("models:")]
    assert found == ["models: 0", "models: 0"], done.stdout + done.stderr


def groups_left(rank, world):
    sys.path.insert(0, str(SCRIPTS))
    ranks = importlib.import_module("training_ranks")
    left = []
    for _ in range(2):  # as two runs
        collectives.new_groups([[0, 1]])
        collectives.new_groups([[0], [1]])
        theirs = dist.new_group([0, 1], group_desc="theirs")
        ranks.close_groups("lcab_plugin")
        left.append(collectives.all_gather_object(rank, theirs))  # still at work
        ranks.close_groups("")
        left.append(len(dist.distributed_c10d._world.pg_map))
    return left


def test_a_run_leaves_no_group_behind():
    """NCCL's buffers for the groups of one run after the other would fill the GPU."""
    assert run(groups_left, 2) == [[[0, 1], 1, [0, 1], 1]] * 2


@pytest.mark.nightly
@pytest.mark.parametrize("strategies", [("none", "none"), ("ulysses", "ring_p2p")])
@pytest.mark.parametrize("framework", ["deepspeed", "megatron"])
def test_a_second_run_in_the_same_process_is_the_same(monkeypatch, tmp_path, framework, strategies):
    pytest.importorskip(framework)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    runs_module = importlib.import_module("training_runs")
    script = str(SCRIPTS.parents[1] / runs_module.SCRIPTS[framework])
    flags = ["--seqlen", "64", "--steps", "3", "--global-batch", "2", "--eval-batches", "0"]
    runs = []
    same, other = strategies
    for name, strategy in (("first", same), ("between", other), ("second", same)):
        arguments = [*flags, "--strategy", strategy, "--name", name, "--out", str(tmp_path)]
        runs.append({"name": name, "script": script, "arguments": arguments})
    plan = tmp_path / "runs.json"
    plan.write_text(json.dumps(runs))
    outcome = launch(
        SCRIPTS / "training_ranks.py",
        [str(plan), "0,1", "0.2"],
        world=1 if same == "none" else 2,
        device="cpu",
        logs=tmp_path / "logs",
        timeout=120,
    )
    assert outcome.status == "done", outcome.reason
    losses = {
        name: [
            (s["loss"], s["grad_norm"])
            for s in records.steps(records.read(tmp_path / name / "metrics.jsonl"))
        ]
        for name in ("first", "between", "second")
    }
    assert losses["first"] == losses["second"]
    assert losses["between"] == [pytest.approx(step, rel=1e-5) for step in losses["first"]]
