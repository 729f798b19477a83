"""examples/train_gpt_megatron.py end to end on the CPU: every degree and option of Megatron's trains as one
process does, by losses, gradient norms, gradients and parameters."""

from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcab_plugin.bench.launch import Outcome, launch
from lcab_plugin.training.gpt import GPTConfig
from lcab_plugin.training.gpt_in_megatron import global_name, merge
from lcab_plugin.training.records import read, steps
from tests.distributed import free_port
from tests.examples.evaluated import assert_same_evaluations

pytest.importorskip("megatron.core")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MODEL = GPTConfig(vocab=260, layers=2, hidden=64, heads=8, kv_heads=4, head_dim=8, ffn=128)
SIZES = ["--layers", 2, "--hidden", 64, "--ffn", 128, "--seqlen", 128, "--vocab", 260]
DATA = ["--loss-mask", "uneven", "--doc-lengths", "pile", "--global-batch", 8, "--micro-batch", 2]
SMALL = [*SIZES, *DATA, "--eval-batches", 1, "--steps", 3, "--recall", 3]
CP = ["--strategy", "ring_p2p"]
TP = ["--tensor-parallel", 2]
SP = [*TP, "--sequence-parallel"]
PP = ["--pipeline-parallel", 2]
SHARDED = ["--distributed-optimizer", "--overlap-grad-reduce"]


def start(out: Path, name: str, world: int, *flags: object, script: str = "train_gpt_megatron.py") -> Outcome:
    arguments = [*SMALL, "--out", out, "--name", name, *flags]
    return launch(
        EXAMPLES / script, [*map(str, arguments)], world=world, device="cpu", logs=out / name, timeout=240
    )


@dataclass
class Trained:
    """What a run left: its records, the gradients of its first step and its last parameters, by our names."""

    records: list[dict[str, Any]]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]

    def curve(self, key: str) -> list[Any]:
        return [record[key] for record in steps(self.records)]


def train(out: Path, name: str, world: int, *flags: object, script: str = "train_gpt_megatron.py") -> Trained:
    folder = out / name
    kept = ["--save-gradients", folder / "gradients.pt"]
    if script == "train_gpt_megatron.py":
        kept += ["--save", folder]
    outcome = start(out, name, world, *flags, *kept, script=script)
    assert outcome.status == "done", (outcome.reason, (folder / "rank0.log").read_text()[-2000:])
    return Trained(
        read(folder / "metrics.jsonl"),
        torch.load(folder / "gradients.pt"),
        saved_parameters(folder / "step3"),
    )


def saved_parameters(folder: Path) -> dict[str, Tensor]:
    """Of a checkpoint, whole."""
    files = sorted(folder.glob("tensor?_pipeline?.pt"))
    stages = len({path.stem[-1] for path in files})
    parts = []
    for path in files:
        model = torch.load(path)["model"]
        first_layer = int(path.stem[-1]) * MODEL.layers // stages
        held = {global_name(n, first_layer): x for n, x in model.items() if isinstance(x, Tensor)}
        parts.append((int(path.stem[len("tensor")]), held))
    return merge(parts, MODEL)


def assert_equal(run: Trained, expected: Trained, budget: float = 1e-5) -> None:
    """Equal but for rounding; ``budget``: the relative deviation that passes."""
    assert run.curve("batch_digest") == expected.curve("batch_digest")
    assert run.curve("loss_tokens") == expected.curve("loss_tokens")
    assert run.curve("model_tflops") == expected.curve("model_tflops")
    for key in ("loss", "grad_norm"):
        assert run.curve(key) == pytest.approx(expected.curve(key), rel=budget), key
    assert run.gradients.keys() == expected.gradients.keys() == MODEL.shapes().keys()
    for name, gradient in expected.gradients.items():
        off = (run.gradients[name] - gradient).norm() / gradient.norm()
        assert off < budget, f"gradient of {name} deviates by {off:.1e}"
    for name, parameter in expected.parameters.items() if run.parameters else ():
        moved = (parameter.float() - MODEL.initial(name, 0)).norm()
        off = (run.parameters[name].float() - parameter.float()).norm() / moved
        assert off < 50 * budget, f"{name} deviates by {off:.1e} of what training moved it"
    assert run.records[-1]["validation_loss"] == pytest.approx(
        expected.records[-1]["validation_loss"], rel=budget
    )
    assert_same_evaluations(run.records, expected.records, budget)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="module")
def alone(out: Path) -> Trained:
    """One process, AdamW: what all others are compared with."""
    return train(out, "alone", 1)


def test_two_ranks_share_each_sequence_and_train_as_one_process_does(out: Path, alone: Trained) -> None:
    shared = train(out, "shared", 2, *CP)
    assert_equal(shared, alone)
    assert [record["type"] for record in shared.records] == ["run", "step", "step", "step", "eval", "end"]
    run, last = shared.records[0], steps(shared.records)[-1]
    assert (run["framework"], run["world"], run["dp"], run["cp"]) == ("megatron", 2, 1, 2)
    assert (run["degrees"], run["attention"]["strategy"]) == ({"ring": 2}, "ring_p2p")
    assert (run["dtype"], run["seed"], run["accumulation_steps"]) == ("fp32", 0, 4)
    assert run["megatron_core"]
    assert run["kernel_version"]
    assert run["slots"] == [line for line in run["slots"] if "decoder.layers.0-1.self_attention" in line]
    assert 0 < max(last["schedule_ms"], last["optimizer_ms"]) <= last["step_ms"]
    assert 0 < last["forward_ms"] <= last["schedule_ms"]
    assert shared.records[-1]["times"]["step"]["repeats"] == 1
    assert all(gib > 0 for gib in shared.records[-1]["memory"]["model_states_gib"])
    assert last["tokens_per_s"] == pytest.approx(last["tokens"] / last["step_ms"] * 1e3)
    assert "Megatron's CUDA calls mean the CPU" in (out / "shared" / "rank0.log").read_text()


def test_auto_is_decided_before_the_model_is_built(out: Path, alone: Trained) -> None:
    auto = train(out, "auto", 4, "--kernel", "auto", "--strategy", "auto", "--layout", "auto", *TP)
    assert_equal(auto, alone)
    run = auto.records[0]
    assert run["auto"]["workload"].items() >= {"heads": 4, "kv_heads": 2, "dtype": "fp32"}.items()
    assert run["auto"]["cp"] == run["cp"] == 2
    names = ("kernel", "strategy", "layout")
    assert [run["attention"][name] for name in names] == [run["auto"][name] for name in names]
    assert run["attention"]["layout"] == "zigzag"
    log = (out / "auto" / "rank0.log").read_text()
    assert log.count("lcab_plugin: auto (kernel, strategy): kernel sdpa_flash, strategy ") == 1


def test_both_frameworks_train_the_same_model(out: Path, alone: Trained) -> None:
    pytest.importorskip("deepspeed")
    deepspeed = train(out, "deepspeed", 1, script="train_gpt.py")
    assert deepspeed.curve("loss")[0] == pytest.approx(alone.curve("loss")[0], rel=1e-6)
    assert_equal(deepspeed, alone)


def test_tensor_pipeline_and_optimizer_shards_with_context_parallelism(out: Path, alone: Trained) -> None:
    assert_equal(train(out, "tp-pp", 4, *SP, *PP), alone)
    assert_equal(train(out, "cp-dp", 4, *CP, "--ring", 2, *SHARDED), alone)


def test_a_resumed_run_goes_on_exactly(out: Path, alone: Trained) -> None:
    parts, saved = out / "parts", ["--resume", out / "parts" / "checkpoints"]
    assert start(out, "parts", 1, "--steps", 2, "--save", parts / "checkpoints").status == "done"
    assert start(out, "parts", 1, *saved).status == "done"
    records = read(parts / "metrics.jsonl")
    assert [record["loss"] for record in steps(records)] == alone.curve("loss")
    assert [record["lr"] for record in steps(records)] == alone.curve("lr")
    other = start(out, "other", 1, "--seed", 1, *saved)
    assert (other.status, "has seed 0, this run 1" in str(other.reason)) == ("cannot run", True)


@pytest.mark.parametrize(
    ("world", "flags", "words"),
    [
        (2, ["--kernel", "sdpa_flsh"], "did you mean 'sdpa_flash'?"),
        (
            2,
            ["--tensor-parallel", 2, "--vocab", 257],
            "--vocab 257 does not divide by --tensor-parallel 2; give 258",
        ),
        (2, ["--pipeline-parallel", 3], "2 ranks do not divide by"),
        (2, [*CP, "--layout", "contiguous"], "layout 'contiguous' cannot be had"),
    ],
)
def test_what_cannot_run_is_one_sentence_on_every_rank(
    tmp_path: Path, world: int, flags: list[object], words: str
) -> None:
    outcome = start(tmp_path, "bad", world, *flags)
    assert outcome.status == "cannot run"
    for rank in range(world):
        log = (tmp_path / "bad" / f"rank{rank}.log").read_text()
        assert words in log
        assert "Traceback" not in log
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"), [(["--dtype", "fp16"], "needs a loss scale"), (["--keep-attention"], "give both")]
)
def test_flags_that_contradict_are_refused(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(EXAMPLES / "train_gpt_megatron.py"))
    monkeypatch.setattr(sys, "argv", ["train_gpt_megatron.py", *flags])
    with pytest.raises(SystemExit):
        example["parse_args"]()
    assert words in capsys.readouterr().err


def test_torchrun_starts_it(tmp_path: Path) -> None:
    command = f"-m torch.distributed.run --nproc-per-node 2 --master-port {free_port()}"
    flags = [*SMALL, *CP, "--steps", 1, "--out", tmp_path, "--name", "run"]
    subprocess.run(
        [sys.executable, *command.split(), str(EXAMPLES / "train_gpt_megatron.py"), *map(str, flags)],
        check=True,
        timeout=240,
        cwd=ROOT,
    )
    assert read(tmp_path / "run" / "metrics.jsonl")[0]["cp"] == 2


MATRIX = {
    "tensor parallel": (2, TP),
    "sequence parallel": (2, SP),
    "pipeline": (2, PP),
    "distributed optimizer": (2, SHARDED),
    "tensor and context parallel": (4, [*TP, *CP]),
    "sequence and context parallel": (4, [*SP, "--strategy", "ulysses"]),
    "pipeline and ring": (4, [*PP, *CP]),
    "pipeline and Ulysses": (4, [*PP, "--strategy", "ulysses"]),
    "pipeline and all-gather": (4, [*PP, "--strategy", "ring_all_gather"]),
    "everything sharded": (4, [*SP, *CP, *SHARDED]),
    "usp": (4, ["--strategy", "usp", "--ulysses", 2, "--ring", 2]),
    "selective recompute, ring": (2, [*CP, "--recompute", "selective"]),
    "selective recompute, Ulysses": (2, ["--strategy", "ulysses", "--recompute", "selective"]),
    "full recompute": (2, [*CP, "--recompute", "full"]),
    "full recompute, attention kept": (2, [*CP, "--recompute", "full", "--keep-attention"]),
    "full recompute in a pipeline": (4, [*PP, *CP, "--recompute", "full"]),
    "full recompute in a pipeline, attention kept": (
        4,
        [*PP, *CP, "--recompute", "full", "--keep-attention"],
    ),
    "overlapped reduction": (4, [*CP, "--ring", 2, "--overlap-grad-reduce"]),
    "overlapped reduction in a pipeline": (4, [*PP, *CP, "--overlap-grad-reduce"]),
}


@pytest.mark.nightly
@pytest.mark.parametrize("cell", MATRIX)
def test_matrix(out: Path, alone: Trained, cell: str) -> None:
    world, flags = MATRIX[cell]
    assert_equal(train(out, cell.replace(" ", "-"), world, *flags), alone)


@pytest.mark.nightly
def test_parameters_after_sgd(out: Path) -> None:
    """Plain gradient descent shows a wrong scale of a gradient, which Adam divides away."""
    sgd = ["--optimizer", "sgd", "--lr", 0.3, "--clip", 0]
    alone = train(out, "sgd", 1, *sgd)
    assert_equal(train(out, "sgd-cp-tp", 4, *sgd, *CP, *SP), alone)
    assert_equal(train(out, "sgd-cp-pp", 4, *sgd, *CP, *PP), alone)
    assert_equal(train(out, "sgd-cp-dp", 4, *sgd, *CP, "--ring", 2), alone)


@pytest.mark.nightly
@pytest.mark.parametrize("flags", [[*CP, *SP], [*CP, *PP], [*CP, "--ring", 2, *SHARDED]])
def test_bf16(out: Path, flags: list[object]) -> None:
    """Within what one process in bf16 differs by from float32."""
    name = "bf16-" + "".join(map(str, flags)).replace("--", "-")
    alone, run = (
        train(out, f"{name}-alone", 1, "--dtype", "bf16"),
        train(out, name, 4, "--dtype", "bf16", *flags),
    )
    assert run.records[0]["dtype"] == "bf16"
    assert run.curve("batch_digest") == alone.curve("batch_digest")
    assert run.curve("loss") == pytest.approx(alone.curve("loss"), rel=1e-3)
    assert run.curve("grad_norm") == pytest.approx(alone.curve("grad_norm"), rel=2e-2)
    for name, gradient in alone.gradients.items():
        assert (run.gradients[name] - gradient).norm() < 4e-2 * gradient.norm(), name


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", [TP, PP, [*CP, *SHARDED]])
def test_every_part_of_a_checkpoint_is_resumed(tmp_path: Path, dtype: str, flags: list[object]) -> None:
    flags = [*flags, "--dtype", dtype]
    assert start(tmp_path, "whole", 2, *flags).status == "done"
    assert start(tmp_path, "parts", 2, *flags, "--steps", 2, "--save", tmp_path / "saved").status == "done"
    assert start(tmp_path, "parts", 2, *flags, "--resume", tmp_path / "saved").status == "done"
    whole, parts = (steps(read(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    assert [record["loss"] for record in parts] == pytest.approx([r["loss"] for r in whole], rel=1e-6)
    other = start(tmp_path, "other", 1, "--dtype", dtype, "--resume", tmp_path / "saved")
    assert other.status == "cannot run"


@pytest.mark.nightly
def test_every_mask_family_trains(out: Path) -> None:
    from lcab_plugin import masks

    for family in masks.names():
        alone = train(out, family, 1, "--mask", family)
        assert_equal(train(out, f"{family}-cp", 2, *CP, "--mask", family), alone)
