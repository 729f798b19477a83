"""Start, watch and restart the training runs of one step of `training.sh`.

    python scripts/gpu/training_cells.py smoke|parity|speed|longest OUT --seconds N --world N --kernels A,B

Each run leaves OUT/NAME/metrics.jsonl, and OUT/NAME/failed.txt with the reason if it did not get to its end.
The ranks (`training_ranks.py`) do one run after the other; when one fails or takes too long they are started
again with the rest. Runs that OUT has already are not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from training_runs import CUDA, SCRIPTS, STEPS, Run, of_length

from lcab_plugin.bench.launch import Outcome, launch

RANKS = Path(__file__).with_name("training_ranks.py")
STARTING = 60.0  # seconds that the first run after a start may take longer


class TooLong(Exception):
    """A run, or the step, has had its time."""


@dataclass
class Step:
    """What all launches of a step share."""

    name: str
    out: Path
    ends: float  # when, by time.monotonic
    patience: float  # seconds that one run may take
    stop: threading.Event = field(default_factory=threading.Event)

    def folder(self, run: Run) -> Path:
        """Of its records."""
        return self.out / run.name

    def done(self, run: Run) -> bool:
        """Whether it got to its end."""
        metrics = self.folder(run) / "metrics.jsonl"
        return metrics.exists() and b'{"type": "end"' in metrics.read_bytes()

    def over(self) -> bool:
        """Whether nothing more is to be started."""
        return self.stop.is_set() or time.monotonic() >= self.ends

    def fail(self, run: Run, reason: str) -> None:
        """Keep why it did not get to its end, and say so."""
        self.folder(run).mkdir(parents=True, exist_ok=True)
        (self.folder(run) / "failed.txt").write_text(reason + "\n")
        say(f"{run.name}: {reason}")


def say(line: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def do(step: Step, runs: Sequence[Run], lane: str) -> None:
    """Runs of the same GPUs, one after the other."""
    left, launches = [run for run in runs if not step.done(run)], 0
    while left and not step.over():
        together = next(list(same) for _, same in groupby(left, key=lambda run: run.framework))
        logs = step.out / "logs" / f"{step.name}-{lane}-{launches}"
        launches += 1
        reason = start(step, together, logs)
        ended = [run for run in together if step.done(run)]
        left = [run for run in left if run not in ended]
        if reason is None and ended:
            continue
        culprit = left[0]  # the ranks do them in this order
        step.fail(culprit, reason or "the ranks ended before it began")
        left = [r for r in left[1:] if r.series is None or r.series != culprit.series]


def start(step: Step, runs: Sequence[Run], logs: Path) -> str | None:
    """One launch; why it ended early, or None."""
    logs.mkdir(parents=True, exist_ok=True)
    todo = []
    for run in runs:
        shutil.rmtree(step.folder(run), ignore_errors=True)  # what an interrupted step left
        where = ["--name", run.name, "--out", str(step.out)]
        if step.name == "parity":
            where += ["--save-gradients", str(step.folder(run) / "gradients.pt")]
        script = str(Path(__file__).parents[2] / SCRIPTS[run.framework])
        todo.append({"name": run.name, "script": script, "arguments": [*run.arguments, *where]})
    plan = logs / "runs.json"
    plan.write_text(json.dumps(todo))
    waiting, since = list(runs), time.monotonic() + STARTING

    def watch() -> None:
        nonlocal since
        while waiting and step.done(waiting[0]):
            say(f"{waiting.pop(0).name}: done")
            since = time.monotonic()
        if step.over():
            raise TooLong("the time of the step ended")
        if time.monotonic() > since + step.patience:
            raise TooLong(f"it took longer than {step.patience:.0f} s; see {logs.relative_to(step.out)}")

    gpus = ",".join(map(str, runs[0].gpus))
    try:
        outcome = launch(
            RANKS,
            [str(plan), gpus],
            world=len(runs[0].gpus),
            device="cuda" if CUDA else "cpu",
            logs=logs,
            timeout=step.ends - time.monotonic() + 10.0,  # `watch` says first that it ended
            watch=watch,
        )
    except TooLong as error:
        return str(error)
    return None if outcome.status == "done" else explain(outcome, logs)


def explain(outcome: Outcome, logs: Path) -> str:
    """The reason, and the last lines of the rank that gave it."""
    ends = [log.read_text(errors="replace").splitlines()[-4:] for log in sorted(logs.glob("rank*.log"))]
    lines = next((end for end in ends if any("Error" in line for line in end)), ends[0])
    return "\n  ".join([f"{outcome.status}: {outcome.reason}", *lines])


def search(step: Step, runs: Sequence[Run]) -> None:
    """The longest of each series: as far as it goes by doubling, then once half way to what failed."""
    for series, found in groupby(runs, key=lambda run: run.series):
        lengths = list(found)
        if step.over():
            return
        do(step, lengths, str(series))
        fit = [run for run in lengths if step.done(run)]
        failed = [run for run in lengths if (step.folder(run) / "failed.txt").exists()]
        if fit and failed:
            half = of_length(fit[-1], (fit[-1].seqlen + failed[0].seqlen) // 2)
            do(step, [half], f"{series}-half")
            fit += [half] if step.done(half) else []
        say(f"{series}: longest {fit[-1].seqlen if fit else None}")


def main() -> None:
    """One step of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="for all runs together")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds of one run")
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--kernels", required=True, help="ours first")
    args = parser.parse_args()
    step = Step(args.step, args.out.resolve(), time.monotonic() + args.seconds, args.patience)
    signal.signal(signal.SIGTERM, lambda *_: step.stop.set())
    runs = list(STEPS[args.step](args.world, args.kernels.split(",")))
    if args.step == "longest":
        search(step, runs)
    else:
        alone = {
            gpus: [r for r in runs if r.gpus == gpus] for gpus in {r.gpus for r in runs} if len(gpus) < 2
        }
        with ThreadPoolExecutor() as side_by_side:
            for lane in [side_by_side.submit(do, step, own, f"gpu{gpus[0]}") for gpus, own in alone.items()]:
                lane.result()
        do(step, [run for run in runs if len(run.gpus) > 1], "all")
    ended = sum(step.done(run) for run in runs)
    say(f"{args.step}: {ended} of {len(runs)} runs done")
    sys.exit(0 if ended else 1)


if __name__ == "__main__":
    main()
