"""examples/train_gpt.py as users start it, end to end on real text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lcab_plugin.training.records import read, steps
from tests.distributed import free_port
from tests.examples.evaluated import assert_same_evaluations

pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = str(ROOT / "examples" / "train_gpt.py")
CONFIGS = ROOT / "examples" / "configs"
SMALL = ["--layers", "2", "--hidden", "64", "--ffn", "128", "--seqlen", "128", "--eval-batches", "1"]


def launch(
    launcher: str, world: int, *flags: object, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run the example; its output is of both streams."""
    launchers = {
        "python": "",
        "deepspeed": f"-m deepspeed.launcher.runner --num_gpus {world} --master_port {free_port()}",
        "torchrun": f"-m torch.distributed.run --nproc-per-node {world} --master-port {free_port()}",
    }
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *launchers[launcher].split(), EXAMPLE, *SMALL, *map(str, flags)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def train(tmp_path: Path, launcher: str, world: int, name: str, *flags: object) -> list[dict[str, Any]]:
    """The records of a run that ends well."""
    done = launch(launcher, world, "--out", tmp_path, "--name", name, *flags)
    assert done.returncode == 0, done.stdout
    assert f"records: {tmp_path / name / 'metrics.jsonl'}" in done.stdout
    return read(tmp_path / name / "metrics.jsonl")


def curve(records: list[dict[str, Any]], key: str = "loss") -> list[Any]:
    return [record[key] for record in steps(records)]


def test_two_ranks_share_each_sequence_and_train_as_one_process_does(tmp_path: Path) -> None:
    flags = ["--steps", 3, "--loss-mask", "uneven", "--doc-lengths", "pile", "--global-batch", 4]
    flags += ["--recall", 5]
    gradients = [tmp_path / "one.pt", tmp_path / "two.pt"]
    one = train(tmp_path, "python", 1, "one", *flags, "--save-gradients", gradients[0])
    two = train(
        tmp_path, "deepspeed", 2, "two", *flags, "--save-gradients", gradients[1], "--strategy", "ring_p2p"
    )
    assert curve(two, "batch_digest") == curve(one, "batch_digest")
    assert curve(two, "loss_tokens") == curve(one, "loss_tokens")
    assert curve(two, "tokens") == [4 * 128] * 3
    assert curve(two, "model_tflops") == curve(one, "model_tflops")
    assert curve(two) == pytest.approx(curve(one), rel=1e-5)
    assert curve(two, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=1e-5)
    single, shared = (torch.load(path) for path in gradients)
    assert single.keys() == shared.keys()
    for name, gradient in single.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(
            shared[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )

    assert [record["type"] for record in two] == ["run", "step", "step", "step", "eval", "end"]
    run, last = two[0], steps(two)[-1]
    assert (run["world"], run["dp"], run["cp"], run["degrees"]) == (2, 1, 2, {"ring": 2})
    replaced = [line.removesuffix(f" of {CONFIGS / 'zero1.json'}") for line in run["overrides"]]
    assert replaced == [
        "strategy ring_p2p (a flag) replaces none",
        "train_batch_size 4 (a flag) replaces 8",
    ]
    assert (run["attention"]["kernel"], run["attention"]["mask"]) == ("sdpa_flash", "causal_document")
    assert (run["zero_stage"], run["dtype"], run["seed"], run["schema"]) == (1, "fp32", 0, 1)
    parts = [last[f"{part}_ms"] for part in ("forward", "backward", "optimizer")]
    assert 0 < max(parts) <= last["step_ms"]
    assert last["tokens_per_s"] == pytest.approx(last["tokens"] / last["step_ms"] * 1e3)
    assert 0.05 < last["peak_memory_gib"] < 8
    assert last["mfu"] is None
    assert two[-1]["validation_loss"] == pytest.approx(one[-1]["validation_loss"], rel=1e-5)
    assert_same_evaluations(two, one, 1e-5)
    assert two[-1]["recall"]["tokens"] == [5] * 5

    assert run["command"][0] == "examples/train_gpt.py"
    assert two[-1]["warm_up_steps"] == 2
    assert two[-1]["times"].keys() == {"data", "step", "forward", "backward", "optimizer"}
    assert two[-1]["times"]["step"]["median_ms"] == last["step_ms"]
    memory = two[-1]["memory"]
    assert all(len(ranks) == 2 for ranks in memory.values())
    state_bytes = run["parameters"] * (4 + 4 + 8 / 2)  # ZeRO 1 deals Adam's and the float32 copy to the ranks
    assert memory["model_states_gib"] == pytest.approx([state_bytes / 2**30] * 2, rel=0.35)
    assert memory["activations_gib"] == [None, None]


def test_the_loss_falls_and_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    flags = ["--micro-batch", 2, "--lr", 3e-3]
    whole = train(tmp_path, "python", 1, "whole", *flags, "--steps", 16, "--eval-every", 8)
    losses = curve(whole)
    assert losses[0] == pytest.approx(5.6, abs=0.2)  # ln 257, knowing nothing
    assert losses[-1] < losses[0] - 1.5
    validation = [record["loss"] for record in whole if record["type"] == "eval"]
    assert validation[1] < validation[0] < losses[0]

    saved = ["--save", tmp_path / "checkpoints"]
    train(tmp_path, "python", 1, "parts", *flags, "--steps", 8, *saved)
    parts = train(tmp_path, "python", 1, "parts", *flags, "--steps", 16, "--resume", tmp_path / "checkpoints")
    assert [record["type"] for record in parts].count("run") == 2
    assert curve(parts, "step") == list(range(16))
    assert curve(parts, "lr") == curve(whole, "lr")
    assert curve(parts) == losses
    assert parts[-1]["validation_loss"] == whole[-1]["validation_loss"]

    refused = launch(
        "python", 1, *flags, "--seed", 1, "--resume", tmp_path / "checkpoints", "--out", tmp_path
    )
    assert refused.returncode == 1
    assert "has seed 0, this run 1" in refused.stdout


def test_bf16_with_activation_checkpointing(tmp_path: Path) -> None:
    records = train(
        tmp_path,
        "python",
        1,
        "bf16",
        "--dtype",
        "bf16",
        "--steps",
        16,
        "--lr",
        3e-3,
        "--activation-checkpointing",
    )
    assert records[0]["dtype"] == "bf16"
    assert curve(records)[-1] < curve(records)[0] - 1


def test_keeping_attention_changes_nothing_but_the_work(tmp_path: Path) -> None:
    flags = ["--strategy", "ring_p2p", "--steps", 3]
    plain = train(tmp_path, "torchrun", 2, "plain", *flags)
    kept = train(tmp_path, "torchrun", 2, "kept", *flags, "--activation-checkpointing", "--keep-attention")
    assert curve(kept) == curve(plain)


def test_auto_is_what_it_says_it_is(tmp_path: Path) -> None:
    auto = ["--kernel", "auto", "--strategy", "auto", "--layout", "auto"]
    done = launch("torchrun", 2, "--out", tmp_path, "--name", "auto", *auto, "--steps", 3)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("lcab_plugin: auto (kernel, strategy, layout): kernel sdpa_flash, ") == 1
    chosen = read(tmp_path / "auto" / "metrics.jsonl")
    record, attention = chosen[0]["auto"], chosen[0]["attention"]
    assert record["auto"] == ["kernel", "strategy", "layout"]
    assert record["workload"]["tokens"] == 128
    assert record["cp"] == chosen[0]["cp"] == 2
    assert record["degrees"] == chosen[0]["degrees"]
    names = {key: attention[key] for key in ("kernel", "strategy", "layout")}
    assert names == {key: record[key] for key in names}
    spelled = [word for key, name in names.items() for word in (f"--{key}", name)]
    named = train(tmp_path, "torchrun", 2, "named", *spelled, "--steps", 3)
    assert named[0]["auto"] is None
    assert named[0]["attention"] == {**attention, "ulysses": None, "ring": None}
    assert curve(named) == curve(chosen)


def test_a_run_that_is_stopped_keeps_its_steps_and_says_where(tmp_path: Path) -> None:
    words = ["--steps", "100000", "--global-batch", "1", "--out", str(tmp_path), "--name", "stopped"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    path = tmp_path / "stopped" / "metrics.jsonl"
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, EXAMPLE, *SMALL, *words], env=environment, **streams) as run:
        for _ in range(600):
            if path.exists() and len(path.read_bytes().splitlines()) > 4:
                break
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        shown, _ = run.communicate(timeout=60)
    assert run.returncode == 130, shown
    assert "Traceback" not in shown
    assert shown.count(f"records: {path}") == 2  # when it began, and when it was stopped
    assert len(steps(read(path))) >= 3


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    done = launch("python", 1, "--kernel", "sdpa_flsh", "--out", tmp_path)
    assert done.returncode == 1
    assert "did you mean 'sdpa_flash'?" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_resumes_under_context_parallelism(tmp_path: Path, stage: int) -> None:
    flags = ["--deepspeed_config", CONFIGS / f"zero{stage}.json", "--strategy", "ring_p2p", "--steps"]
    whole = train(tmp_path, "torchrun", 2, "whole", *flags, 6)
    train(tmp_path, "torchrun", 2, "parts", *flags, 3, "--save", tmp_path / "checkpoints")
    parts = train(tmp_path, "torchrun", 2, "parts", *flags, 6, "--resume", tmp_path / "checkpoints")
    assert curve(parts) == pytest.approx(curve(whole), rel=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_data_and_context_parallel_together(tmp_path: Path, stage: int, dtype: str) -> None:
    flags = ["--deepspeed_config", CONFIGS / f"zero{stage}.json", "--dtype", dtype, "--loss-mask", "uneven"]
    flags += ["--steps", 3]
    one = train(tmp_path, "python", 1, "one", *flags)
    four = train(tmp_path, "torchrun", 4, "four", *flags, "--strategy", "ulysses", "--ulysses", 2)
    assert (four[0]["dp"], four[0]["cp"]) == (2, 2)
    assert curve(four, "batch_digest") == curve(one, "batch_digest")
    budget = 1e-5 if dtype == "fp32" else 5e-3
    assert curve(four) == pytest.approx(curve(one), rel=budget)
    assert curve(four, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=10 * budget)


@pytest.mark.nightly
def test_a_folder_trains_under_every_family(tmp_path: Path) -> None:
    from lcab_plugin import masks

    for family in masks.names():
        records = train(
            tmp_path,
            "python",
            1,
            family,
            "--mask",
            family,
            "--data",
            ROOT / "lcab_plugin" / "masks",
            "--steps",
            2,
        )
        assert records[0]["attention"]["mask"] == family
