"""Start, watch and restart the training runs of one step of `training.sh`.

    python scripts/gpu/training_cells.py smoke|parity|speed|longest OUT --seconds N --world N --kernels A,B

Each run leaves OUT/NAME/metrics.jsonl, and OUT/NAME/failed.txt with the reason if it failed or took too long.
The ranks (`training_ranks.py`) do one run after the other; when one fails they are started again with the
rest. What OUT has of either is not done again, but what the end of the step's time cut is: remove failed.txt
to have a run tried again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import training_table
from training_runs import CUDA, NO_MEMORY, SCRIPTS, STEPS, Run, of_length

from lcab_plugin.bench.launch import Outcome, launch

RANKS = Path(__file__).with_name("training_ranks.py")
STARTING = 30.0  # seconds that the first run after a start may take longer
# Of a GPU, what runs may leave behind for the next one in their process, mostly buffers of NCCL (Megatron's
# groups: 3 GiB a run over two GPUs): more where the next one does not need a whole GPU.
LEFT_BEHIND, LEFT_BEHIND_LONGEST = 0.25, 0.03


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
    judge: Judge | None = None

    def folder(self, run: Run) -> Path:
        """Of its records."""
        return self.out / run.name

    def done(self, run: Run) -> bool:
        """Whether it got to its end."""
        metrics = self.folder(run) / "metrics.jsonl"
        return metrics.exists() and b'{"type": "end"' in metrics.read_bytes()

    def failure(self, run: Run) -> str | None:
        """Why it failed, if it did."""
        failed = self.folder(run) / "failed.txt"
        return failed.read_text() if failed.exists() else None

    def left(self, runs: Sequence[Run]) -> list[Run]:
        """Those that have neither got to their end nor failed, nor follow a failure in their series."""
        failed = {run.series for run in runs if run.series and self.failure(run) is not None}
        return [r for r in runs if not (self.done(r) or self.failure(r) is not None or r.series in failed)]

    def over(self) -> bool:
        """Whether nothing more is to be started."""
        return self.stop.is_set() or time.monotonic() >= self.ends

    def fail(self, run: Run, reason: str) -> None:
        """Keep why it did not get to its end, and say so."""
        self.folder(run).mkdir(parents=True, exist_ok=True)
        (self.folder(run) / "failed.txt").write_text(reason + "\n")
        say(f"{run.name}: {reason.splitlines()[0]}")


class Judge:
    """Compares runs of parity with their baseline while others train: each of 1b leaves 4 GB of gradients:
    together more than a disk may hold. What ends before the baselines and their twins waits for them."""

    def __init__(self, step: Step, runs: Sequence[Run]) -> None:
        self.step, self.baselines = step, [run for run in runs if "-baseline-" in run.name]
        self.waiting: list[Run] = []
        self.parities: dict[str, training_table.Parity] = {}
        self.pool = ThreadPoolExecutor(1)
        self.compared: list[Future[None]] = []

    def ended(self, run: Run) -> None:
        """One more to compare."""
        self.compared.append(self.pool.submit(self.compare, run))

    def compare(self, run: Run) -> None:
        """All that can be compared now."""
        self.waiting.append(run)
        if self.step.left(self.baselines):
            return
        while self.waiting:
            name = self.waiting.pop(0).name
            found = training_table.row(self.step.out, self.step.out / name, self.parities)
            say(f"{name}: {'; '.join([found['verdict'], *found.get('problems', ())])}")

    def close(self) -> None:
        """Wait for the last; raises what went wrong."""
        self.pool.shutdown()
        for one in self.compared:
            one.result()


def say(line: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def do(step: Step, runs: Sequence[Run], lane: str) -> None:
    """Runs of the same GPUs, one after the other."""
    launches = 0
    while (left := step.left(runs)) and not step.over():
        together = next(list(same) for _, same in groupby(left, key=lambda run: run.framework))
        logs = step.out / "logs" / f"{step.name}-{lane}-{time.strftime('%H%M%S')}-{launches}"
        launches += 1
        reason = start(step, together, logs)
        pending = [run for run in together if not step.done(run)]
        if not pending:
            continue
        if step.over():
            say(f"{pending[0].name}: cut, {reason}")
        elif reason is not None or len(pending) == len(together):
            step.fail(pending[0], reason or "the ranks ended before it began")  # they do them in this order


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

    def ended() -> None:
        nonlocal since
        while waiting and step.done(waiting[0]):
            done = waiting.pop(0)
            say(f"{done.name}: done")
            since = time.monotonic()
            if step.judge:
                step.judge.ended(done)

    def watch() -> None:
        ended()
        if step.over():
            raise TooLong("the time of the step ended")
        if time.monotonic() > since + step.patience:
            raise TooLong(f"it took longer than {step.patience:.0f} s; see {logs.relative_to(step.out)}")

    gpus = ",".join(map(str, runs[0].gpus))
    try:
        outcome = launch(
            RANKS,
            [str(plan), gpus, str(LEFT_BEHIND_LONGEST if step.name == "longest" else LEFT_BEHIND)],
            world=len(runs[0].gpus),
            device="cuda" if CUDA else "cpu",
            logs=logs,
            timeout=step.ends - time.monotonic() + 10.0,  # `watch` says first that it ended
            watch=watch,
        )
    except TooLong as error:
        return str(error)
    finally:
        ended()  # the last may have, and the ranks with it, since `watch` looked
    return None if outcome.status == "done" else explain(outcome, logs)


def explain(outcome: Outcome, logs: Path) -> str:
    """The reason: of all ranks' last lines one that speaks of memory, else those of the rank that failed."""
    ends = [log.read_text(errors="replace").splitlines()[-60:] for log in sorted(logs.glob("rank*.log"))]
    if lack := next((line for end in ends for line in reversed(end) if NO_MEMORY.search(line)), None):
        return lack.strip()
    ends = [end[-4:] for end in ends]
    lines = next((end for end in ends if any("Error" in line for line in end)), ends[0])
    return "\n  ".join([f"{outcome.status}: {outcome.reason}", *lines])


def search(step: Step, runs: Sequence[Run]) -> int:
    """The longest of each series, given as its first guess; the next of the same unit is guessed to end where
    the last one did. Returns how many series trained at some length."""
    ended: dict[int, int] = {}
    found = 0
    for run in runs:
        if step.over():
            break
        if longest := climb(step, run, ended.get(run.unit, run.seqlen // run.unit)):
            ended[run.unit] = longest
            found += 1
    return found


def climb(step: Step, run: Run, guess: int) -> int:
    """The longest length that fits, in units, 0 if none was trained: from a guess by strides that double,
    until one length fits and a longer one does not, then by halves of what lies between.

    The first launch is given the guess and the next length, so a guess that is right takes one. Only what
    runs out of memory is too long; anything else stops the search.
    """
    fits, fails, stride, asked = 0, None, 1, [guess, guess + 1]
    while asked and not step.over():
        probes = [of_length(run, units) for units in asked]
        do(step, probes, f"{run.series}-{asked[0]}")
        for units, probe in zip(asked, probes, strict=True):
            if step.done(probe):
                fits = units
                continue
            reason = step.failure(probe) or "its time ended"
            if NO_MEMORY.search(reason) is None:
                say(f"{run.series}: {fits * run.unit} fit; stopped at {probe.seqlen}: {reason.strip()}")
                return fits
            fails = units
            break
        if fails is None:
            asked = [fits + stride] if fits < 2 * guess else []
        elif not fits:
            asked = [max(1, fails - stride)] if fails > 1 else []
        else:
            asked = [(fits + fails) // 2] if fails - fits > 1 else []
        stride *= 2
    say(
        f"{run.series}: {fits * run.unit} fit, "
        + (f"{fails * run.unit} did not" if fails else "more not tried")
    )
    return fits


def side_by_side(step: Step, runs: Sequence[Run]) -> None:
    """First those of one GPU, on all GPUs at the same time, then those of several."""
    single = {gpus: [r for r in runs if r.gpus == gpus] for gpus in {r.gpus for r in runs} if len(gpus) < 2}
    with ThreadPoolExecutor() as pool:
        for lane in [pool.submit(do, step, own, f"gpu{gpus[0]}") for gpus, own in single.items()]:
            lane.result()
    do(step, [run for run in runs if len(run.gpus) > 1], "all")


def main() -> None:
    """One step of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True, help="for all runs together")
    # one GPU trains 50 steps of 1b in float32 in 61 s
    parser.add_argument("--patience", type=float, default=120.0, help="seconds of one run")
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--kernels", required=True, help="ours first")
    parser.add_argument("--only", default="", help="a regular expression that the names of runs match")
    args = parser.parse_args()
    step = Step(args.step, args.out.resolve(), time.monotonic() + args.seconds, args.patience)
    signal.signal(signal.SIGTERM, lambda *_: step.stop.set())
    planned = STEPS[args.step](args.world, args.kernels.split(","))
    runs = [run for run in planned if re.search(args.only, run.name)]
    if args.step == "longest":
        ended = search(step, runs)
    else:
        if args.step == "parity":
            step.judge = Judge(step, runs)
        side_by_side(step, runs)
        if step.judge:
            step.judge.close()
        ended = sum(step.done(run) for run in runs)
    say(f"{args.step}: {ended} of {len(runs)} done")
    sys.exit(0 if ended else 1)


if __name__ == "__main__":
    main()
