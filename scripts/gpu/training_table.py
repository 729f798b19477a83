"""The runs that `training.sh` left in a folder as one table, with the parity of those that can be compared.

    python scripts/gpu/training_table.py OUT          # prints it; writes OUT/table.md and OUT/table.json

A run is compared with OUT/parity-baseline by the rules of `lcab parity`: the same tokens, losses, gradient
norms and step-0 gradients; in bf16 within twice what the baseline differs by from OUT/parity-baseline-fp32.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lcab_plugin.bench import compare
from lcab_plugin.training import records
from lcab_plugin.training.loop import WARM_UP

BASELINE, EXACT = "parity-baseline", "parity-baseline-fp32"
COLUMNS = (
    *("run", "framework", "kernel", "strategy", "layout", "mask", "cp", "zero", "seqlen"),
    *("step ms", "tokens/s", "MFU", "peak GiB", "last loss"),
    *("loss dev", "norm dev", "gradient dev", "verdict"),
)


def trace(folder: Path) -> compare.Trace:
    """What can be compared of a run."""
    saved = folder / "gradients.pt"
    gradients = torch.load(saved, map_location="cpu", weights_only=True) if saved.exists() else {}
    return compare.Trace(records.steps(records.read(folder / "metrics.jsonl")), gradients)


class Parity:
    """The baseline of the folder and the budget that it gives."""

    def __init__(self, out: Path) -> None:
        self.baseline = trace(out / BASELINE) if (out / BASELINE / "metrics.jsonl").exists() else None
        self.budget: compare.Budget | None = None
        if self.baseline is None:
            return
        first = records.read(out / BASELINE / "metrics.jsonl")[0]
        if first["dtype"] == "fp32":
            self.budget = compare.FP32
        elif (out / EXACT / "metrics.jsonl").exists():
            exact = trace(out / EXACT)
            if not compare.different_runs(self.baseline, exact, first["steps"]):
                self.budget = compare.twice(compare.deviations(self.baseline, exact))

    def judge(self, folder: Path, steps: int) -> dict[str, Any]:
        """Deviations, verdict and problems of a run, kept beside its records: gradients are large."""
        kept = folder / "compared.json"
        if kept.exists():
            return dict(json.loads(kept.read_text()))
        found = self.compare(folder, steps)
        if found["verdict"] in ("pass", "fail"):
            kept.write_text(json.dumps(found) + "\n")
        return found

    def compare(self, folder: Path, steps: int) -> dict[str, Any]:
        """The same, anew."""
        if self.baseline is None:
            return {"verdict": "no baseline"}
        run = trace(folder)
        if problems := compare.different_runs(self.baseline, run, steps):
            return {"verdict": "not comparable", "problems": problems}
        found = compare.deviations(self.baseline, run)
        if folder.name in (BASELINE, EXACT):
            return {**asdict(found), "verdict": folder.name.removeprefix("parity-")}
        if self.budget is None:
            return {**asdict(found), "verdict": "no budget"}
        problems = compare.over_budget(found, self.budget)
        return {**asdict(found), "verdict": "fail" if problems else "pass", "problems": problems}


def row(folder: Path, parity: Parity) -> dict[str, Any]:
    """One run: what it was, what it took, how it compares."""
    failed, metrics = folder / "failed.txt", folder / "metrics.jsonl"
    found: dict[str, Any] = {"run": folder.name}
    if failed.exists():
        found |= {"verdict": "did not end", "problems": [" ".join(failed.read_text().split("\n")[:1])]}
    lines = records.read(metrics) if metrics.exists() else []
    steps = records.steps(lines)
    if not steps:
        return found
    run, attention = lines[0], lines[0]["attention"]
    warm = steps[min(WARM_UP, len(steps) - 1) :]
    step_ms = statistics.median(step["step_ms"] for step in warm)
    shares = [step["mfu"] for step in warm if step["mfu"] is not None]
    found |= {key: attention[key] for key in ("kernel", "strategy", "mask")}
    found |= {key: run.get(key) for key in ("framework", "cp", "dp", "dtype", "seqlen", "steps", "device")}
    found |= {
        "layout": attention["layout"] if run["cp"] > 1 else None,
        "zero": run.get("zero_stage"),
        "step_ms": step_ms,
        "tokens_per_s": warm[-1]["tokens"] / step_ms * 1e3,
        "mfu": statistics.median(shares) if shares else None,
        "peak_gib": max(step["peak_memory_gib"] for step in steps),
        "last_loss": steps[-1]["loss"],
    }
    if folder.name.startswith("parity-") and not failed.exists():
        found |= parity.judge(folder, run["steps"])
    return found


def cells(found: dict[str, Any]) -> list[str]:
    """A row of the printed table."""

    def shown(key: str, form: str) -> str:
        value = found.get(key)
        return "-" if value is None else format(value, form)

    def larger(key: str) -> str:
        return f"{max(found[key], found[f'{key}_later']):.1e}" if key in found else "-"

    return [
        *(shown(key, "") for key in ("run", "framework", "kernel", "strategy", "layout", "mask")),
        *(shown(key, "") for key in ("cp", "zero", "seqlen")),
        *(shown("step_ms", ".0f"), shown("tokens_per_s", ",.0f"), shown("mfu", ".1%")),
        *(shown("peak_gib", ".1f"), shown("last_loss", ".4f"), larger("loss"), larger("grad_norm")),
        *(shown("gradient", ".1e"), found.get("verdict", "-")),
    ]


def main() -> None:
    """The table of a folder."""
    out = Path(sys.argv[1])
    files = [path for name in ("failed.txt", "metrics.jsonl") for path in out.glob(f"*/{name}")]
    ended = {path.parent: path.stat().st_mtime for path in files}
    parity = Parity(out)
    rows = [row(folder, parity) for folder in sorted(ended, key=ended.__getitem__)]
    lines = ["| " + " | ".join(line) + " |" for line in (COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows))]
    if parity.budget is not None:
        lines += ["", f"{parity.budget}."]
    lines += ["", *(f"- {r['run']}: {'; '.join(r['problems'])}" for r in rows if r.get("problems"))]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    budget = None if parity.budget is None else asdict(parity.budget)
    (out / "table.json").write_text(json.dumps({"budget": budget, "rows": rows}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
