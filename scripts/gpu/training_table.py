"""The runs that `training.sh` left in a folder as one table, with the parity of those that can be compared.

    python scripts/gpu/training_table.py OUT          # prints it; writes OUT/table.md and OUT/table.json

A run is compared with the baseline of its preset, framework and mask, in the folder
parity-PRESET-FRAMEWORK-baseline-MASK, by the rules of `lcab parity`: the same tokens, losses, gradient norms
and step-0 gradients; in bf16 within twice what the baseline differs by from its float32 twin, after ten steps
four times. Runs in float32 are compared with their framework's twin, and Megatron's twin with DeepSpeed's, by
the bounds of fp32. Times are medians of the steps after the first two.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from training_runs import NO_MEMORY, SCRIPTS

from lcab_plugin.bench import compare
from lcab_plugin.training import records
from lcab_plugin.training.loop import WARM_UP

# The tables: a title, the columns, and what each shows of a row.
WHAT = {"framework": "framework", "kernel": "kernel", "strategy": "strategy", "layout": "layout"}
PARITY = {"preset": "preset", "mask": "mask", **WHAT, "GPUs": "world", "ZeRO": "zero", "dtype": "dtype"}
PARITY |= {
    "step ms": "step_ms",
    "peak GiB": "peak_gib",
    "last loss": "last_loss",
    "loss, first 10 steps": "loss",
}
PARITY |= {"loss, later": "loss_later", "gradient norm": "norms", "step-0 gradients": "gradient"}
PARITY |= {"verdict": "verdict"}
TIMES = {"step ms": "step_ms", "tokens/s": "tokens_per_s", "MFU": "mfu", "peak GiB": "peak_gib"}
SPEED = {"preset": "preset", "mask": "mask", **WHAT, "GPUs": "world", "ZeRO": "zero"}
SPEED |= {"recomputed": "recomputed", "timed": "timed", **TIMES}
LONGEST = {**WHAT, "GPUs": "world", "ZeRO": "zero", "recomputed": "recomputed", "longest": "seqlen"}
LONGEST |= {"too long": "too_long", **TIMES}
OF_SEVERAL = ("strategy", "layout", "world")
FORMS = {"step_ms": ".0f", "tokens_per_s": ",.0f", "mfu": ".1%", "peak_gib": ".1f", "last_loss": ".4f"}
FORMS |= dict.fromkeys(("loss", "loss_later", "norms", "gradient"), ".1e")
FORMS |= dict.fromkeys(("seqlen", "too_long"), ",d")


def trace(folder: Path) -> compare.Trace:
    """What can be compared of a run."""
    saved = folder / "gradients.pt"
    gradients = torch.load(saved, map_location="cpu", weights_only=True) if saved.exists() else {}
    return compare.Trace(records.steps(records.read(folder / "metrics.jsonl")), gradients)


class Parity:
    """A baseline in the folder, and the budget that it gives."""

    def __init__(self, out: Path, name: str) -> None:
        self.name = name
        self.first, self.exact = (out / name / "metrics.jsonl" for name in (name, f"{name}-fp32"))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Of the baseline."""
        return records.read(self.first)[0]

    @cached_property
    def baseline(self) -> compare.Trace:
        """What it left."""
        return trace(self.first.parent)

    @cached_property
    def budget(self) -> compare.Budget | None:
        """From the baseline and its float32 twin."""
        if not self.first.exists():
            return None
        if self.facts["dtype"] == "fp32":
            return compare.FP32
        found = self.beside(self.exact.parent, self.facts["steps"]) if self.exact.exists() else None
        return compare.twice(found) if isinstance(found, compare.Deviations) else None

    def beside(self, folder: Path, steps: int) -> compare.Deviations | list[str]:
        """How far a run is from the baseline, or why that cannot be said. Kept beside the run's records in
        place of its gradients, which are large (4 GB of preset 1b); baselines keep theirs."""
        kept = folder / f"beside-{self.name}.json"
        if kept.exists() and kept.stat().st_mtime >= self.first.stat().st_mtime:
            return compare.Deviations(**json.loads(kept.read_text()))
        if kept.exists() and not (folder / "gradients.pt").exists():
            return ["was compared with an earlier run of its baseline; remove its folder to run it again"]
        run = trace(folder)
        if problems := compare.different_runs(self.baseline, run, steps):
            return problems
        found = compare.deviations(self.baseline, run, self.facts["dtype"])
        kept.write_text(json.dumps(asdict(found)) + "\n")
        if "-baseline-" not in folder.name:
            (folder / "gradients.pt").unlink()
        return found

    def judge(self, folder: Path, steps: int) -> dict[str, Any]:
        """Deviations, verdict and problems of a run."""
        if not self.first.exists():
            return {"verdict": "no baseline"}
        found = self.beside(folder, steps)
        if not isinstance(found, compare.Deviations):
            return {"verdict": "not comparable", "problems": found}
        if folder.name.startswith(self.name):
            exact = folder.name.endswith("-fp32")
            return {**asdict(found), "verdict": "baseline in fp32" if exact else "baseline"}
        if self.budget is None:
            return {**asdict(found), "verdict": "no budget"}
        problems = compare.over_budget(found, self.budget)
        return {**asdict(found), "verdict": "fail" if problems else "pass", "problems": problems}


def baseline_of(name: str, framework: str, mask: str) -> str:
    """What the run of that name is compared with: one in float32 with its framework's float32 twin, and that
    of a second framework with that of the first."""
    preset, frameworks = name.split("-")[1], (framework, next(iter(SCRIPTS)))
    own, first = (f"parity-{preset}-{of}-baseline-{mask}" for of in frameworks)
    if not name.endswith("-fp32") or name == f"{first}-fp32":
        return own
    return f"{first}-fp32" if name == f"{own}-fp32" else f"{own}-fp32"


def recomputed(run: dict[str, Any]) -> str | None:
    """What of a block is computed once more in the backward pass."""
    if not {"--activation-checkpointing", "--recompute"} & set(run["command"]):
        return None
    return "all but attention" if "--keep-attention" in run["command"] else "all"


def row(out: Path, folder: Path, parities: dict[str, Parity]) -> dict[str, Any]:
    """One run: what it was, what it took, how it compares."""
    failed, metrics = folder / "failed.txt", folder / "metrics.jsonl"
    found: dict[str, Any] = {"run": folder.name}
    lines = records.read(metrics) if metrics.exists() else []
    steps = records.steps(lines)
    if failed.exists():
        found |= {"verdict": "did not end", "problems": [failed.read_text().split("\n")[0]]}
    elif not lines or lines[-1]["type"] != "end":
        found |= {"verdict": "did not end", "problems": [f"its time ended after {len(steps)} steps"]}
    if not steps:
        return found
    run, attention = lines[0], lines[0]["attention"]
    warm = steps[min(WARM_UP, len(steps) - 1) :]
    step_ms = statistics.median(step["step_ms"] for step in warm)
    shares = [step["mfu"] for step in warm if step["mfu"] is not None]
    found |= {key: attention[key] for key in ("kernel", "strategy", "mask")}
    found |= {key: run.get(key) for key in ("framework", "world", "cp", "dtype", "seqlen", "steps", "device")}
    flags = dict(pairwise(run["command"]))
    found |= {
        "preset": flags.get("--preset"),
        "layout": attention["layout"] if run["cp"] > 1 else None,
        # Megatron's counterpart of stage 1 is its distributed optimizer
        "zero": run.get("zero_stage", int("--distributed-optimizer" in run["command"])),
        "recomputed": recomputed(run),
        "timed": len(warm),
        "step_ms": step_ms,
        "tokens_per_s": warm[-1]["tokens"] / step_ms * 1e3,
        "mfu": statistics.median(shares) if shares else None,
        "peak_gib": max(step["peak_memory_gib"] for step in steps),
        "last_loss": steps[-1]["loss"],
    }
    if folder.name.startswith("parity-") and "verdict" not in found:
        baseline = baseline_of(folder.name, run["framework"], attention["mask"])
        if baseline not in parities:
            parities[baseline] = Parity(out, baseline)
        found |= parities[baseline].judge(folder, run["steps"])
        if "grad_norm" in found:
            found["norms"] = max(found["grad_norm"], found["grad_norm_later"])
    return found


def longest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each series of lengths its longest run that ended, with the shortest that lacked memory."""
    series: dict[str, list[dict[str, Any]]] = {}
    for found in rows:
        series.setdefault(found["run"].rpartition("-")[0], []).append(found)
    best = []
    for name, own in series.items():
        ended = [found for found in own if "verdict" not in found]
        lacking = [r for r in own if any(map(NO_MEMORY.search, r.get("problems", ())))]
        tried = [int(found["run"].rpartition("-")[2]) for found in lacking]
        last = max(ended, key=lambda found: found["seqlen"], default={"run": name})
        best.append(last | {"too_long": min(tried, default=None)})
    return best


def table(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> list[str]:
    """Rows under a title; nothing where there are none. Those of one GPU alone need no columns of several."""

    def shown(key: str, value: Any) -> str:
        text = "-" if value is None else format(value, FORMS.get(key, ""))
        return f"`{text}`" if key in ("kernel", "mask") and value else text

    if not rows:
        return []
    if {found["world"] for found in rows if "world" in found} == {1}:
        title += ", one GPU"
        columns = {name: key for name, key in columns.items() if key not in OF_SEVERAL}
    right = [
        "---:" if key in FORMS or key in ("world", "zero", "timed") else "---" for key in columns.values()
    ]
    cells = [[shown(key, found.get(key)) for key in columns.values()] for found in rows]
    lines = ["| " + " | ".join(line) + " |" for line in (list(columns), right, *cells)]
    return [f"### {title}", "", *lines, ""]


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """All of them: parity, speed by length, the longest sequences, and what did not end."""
    of = {
        kind: [r for r in rows if r["run"].startswith(f"{kind}-")] for kind in ("parity", "speed", "longest")
    }
    lines = table("Parity", PARITY, [found for found in of["parity"] if "step_ms" in found])
    timed = [found for found in of["speed"] if "step_ms" in found]
    kinds = ("seqlen", "preset", "mask", "world", "framework")
    timed.sort(key=lambda r: (*(r[kind] for kind in kinds), r["kernel"] != "triton"))
    for seqlen in sorted({found["seqlen"] for found in timed}):
        lines += table(f"{seqlen:,} tokens", SPEED, [found for found in timed if found["seqlen"] == seqlen])
    lines += table("Longest sequence", LONGEST, longest(of["longest"]))
    lines += [
        f"- `{found['run']}`: {'; '.join(found['problems'])}" for found in rows if found.get("problems")
    ]
    return lines


def main() -> None:
    """The tables of a folder."""
    out = Path(sys.argv[1])
    files = [path for name in ("failed.txt", "metrics.jsonl") for path in out.glob(f"*/{name}")]
    ended = {path.parent: path.stat().st_mtime for path in files}
    parities: dict[str, Parity] = {}
    rows = [row(out, folder, parities) for folder in sorted(ended, key=ended.__getitem__)]
    lines = tables(rows)
    budgets = {name: parity.budget for name, parity in parities.items() if parity.budget is not None}
    lines += [f"- `{name}`: {budget}." for name, budget in budgets.items()]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    kept = {name: asdict(budget) for name, budget in budgets.items()}
    (out / "table.json").write_text(json.dumps({"budgets": kept, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
