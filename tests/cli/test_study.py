"""`lcab study`: real cells on this machine, of two nodes among them, and what a kill leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcab_plugin.cli import main

ROOT = Path(__file__).parents[2]
SMALL = "heads: 4, kv_heads: 2, head_dim: 32, dtype: fp32, cell_seconds: 0.02, passes: [fwd], timeout: 300"
KERNELS = (
    "  - {kind: kernels, kernels: [naive, sdpa_flash, fa3], masks: [causal, full], seqlens: [64], "
    + SMALL
    + "}"
)
CP = (
    "  - {kind: cp, kernels: [naive], strategies: [ring_p2p], masks: [causal], worlds: [2], seqlens: [64], "
    + SMALL
    + "}"
)
TRAINING = (
    "  - {kind: training, kernels: [naive], strategies: [ring_p2p], masks: [causal], worlds: [2, 4], "
    "seqlens: [64], dtype: fp32, steps: 2, timeout: 300}"
)
NODES = "launcher: {kind: %s, hostfile: nodes, ssh: none}"


def study(folder: Path, *sweeps: str, launcher: str = "") -> Path:
    (folder / "nodes").write_text("node-a slots=1\nnode-b slots=1\n")
    path = folder / "study.yaml"
    path.write_text("\n".join(["name: sample", "device: cpu", launcher, "sweeps:", *sweeps]))
    return path


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def command(file: Path, *words: str) -> list[str]:
    out = ["--out", str(file.parent / "out")]
    return [sys.executable, "-m", "lcab_plugin.cli", "study", str(file), *out, *words]


def run(file: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(file, *words),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=environment(**more),
    )


Lcab = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lcab:
    """The command in this process, where it starts none: file, words -> exit status, stdout, stderr."""

    def lcab(file: Path, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", command(file, *words)[2:])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return lcab


def cells(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["cells"]
    return found


def records(folder: Path, pattern: str = "runs/*/records.jsonl") -> list[dict[str, Any]]:
    lines = [line for path in folder.glob(pattern) for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def processes_of(folder: Path) -> list[str]:
    """Command lines of running processes that name the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if str(folder) in line]


@pytest.mark.parametrize(
    ("launcher", "sweep"),
    [
        ("torchrun", TRAINING),
        ("deepspeed", TRAINING),
        pytest.param("torchrun", CP, marks=pytest.mark.nightly),
        pytest.param("deepspeed", CP, marks=pytest.mark.nightly),
    ],
)
def test_two_nodes(tmp_path: Path, launcher: str, sweep: str) -> None:
    file = study(tmp_path, sweep, launcher=NODES % launcher)
    found = cells(run(file, "--json"))
    status = [(cell["world"], cell["status"]) for cell in found]
    if sweep == CP:
        assert status == [(2, "ok")]
        assert {r["world"] for r in records(tmp_path / "out") if r["type"] == "cell"} == {2}
        return
    assert status == [(2, "ok"), (4, "cannot run")]
    assert "4 ranks do not fill the hostfile" in found[1]["reason"]
    lines = records(tmp_path / "out", "runs/*/*/metrics.jsonl")
    assert [line["type"] for line in lines if line["type"] != "eval"] == ["run", "step", "step", "end"]
    assert (lines[0]["world"], lines[0]["cp"]) == (2, 2)
    (launch,) = (json.loads(p.read_text()) for p in (tmp_path / "out").glob("runs/*/launch.json"))
    assert len(launch["commands"]) == 2
    if launcher == "deepspeed":
        ranks = [words[words.index("--node_rank") + 1] for words in launch["commands"]]
        assert ranks == ["0", "1"]
        assert all("--no_ssh" in words for words in launch["commands"])


def test_a_killed_study_goes_on_where_it_was(tmp_path: Path) -> None:
    file, out = study(tmp_path, KERNELS), tmp_path / "out"
    process = subprocess.Popen(command(file), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(list(out.glob("runs/*/launch.json"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)  # in the middle of the second launch
    process.wait()
    while processes_of(out) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(out) == []
    before = [r for r in records(out) if r["type"] == "cell"]
    assert before

    found = cells(run(file, "--json"))
    kernel_status = Counter((cell["kernel"], cell["status"]) for cell in found)
    assert kernel_status == {("naive", "ok"): 2, ("sdpa_flash", "ok"): 2, ("fa3", "cannot run"): 2}
    measured = Counter((r["kernel"], r["mask"]) for r in records(out) if r["type"] == "cell")
    assert set(measured.values()) == {1}
    assert len(measured) == 4
    assert all(record in records(out) for record in before)

    launches = sorted(out.glob("runs/*"))
    again = run(file)
    assert again.returncode == 0
    assert (
        again.stderr == f"6 cells by launcher local: 2 cannot run, 4 are done, 0 to run; records in {out}\n"
    )
    assert sorted(out.glob("runs/*")) == launches


def test_an_interrupt_keeps_what_is_done_and_says_so(tmp_path: Path) -> None:
    file, out = study(tmp_path, KERNELS), tmp_path / "out"
    process = subprocess.Popen(
        command(file, "--json"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 300
    while not list(out.glob("runs/*/launch.json")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    answer, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.endswith("Interrupted; the same command goes on where this one stopped.\n")
    assert processes_of(out) == []
    assert len(json.loads(answer)["cells"]) == 6
    assert len((out / "study.jsonl").read_text().splitlines()) == 7


def test_a_log_says_how_long_the_rest_will_take(tmp_path: Path) -> None:
    said = run(study(tmp_path, KERNELS)).stderr.splitlines()
    assert len(said) == 3
    assert re.fullmatch(r"3/6 kernels-causal-64-w1-\w+: 2 cells", said[1])
    assert re.fullmatch(r"5/6 kernels-full-64-w1-\w+: 2 cells, 0:00:\d\d so far, 0:00:\d\d left", said[2])


def test_a_dry_run_starts_nothing(tmp_path: Path, here: Lcab) -> None:
    file = study(tmp_path, KERNELS, CP, TRAINING, launcher=NODES % "torchrun")
    status, shown, _ = here(file, "--dry-run")
    assert status == 0
    assert "bench kernels --masks causal --seqlens 64 --passes fwd --heads 4:2" in shown
    assert shown.count("torch.distributed.run --nnodes 2 --nproc-per-node 1") == 4
    assert not (tmp_path / "out").exists()
    plan = json.loads(here(file, "--dry-run", "--json")[1])
    assert [len(launch["commands"]) for launch in plan["launches"]] == [1, 1, 2, 2]
    assert [cell["status"] for cell in plan["cells"]] == [None] * 8 + ["cannot run"]


def test_another_node_is_reached_by_ssh(tmp_path: Path) -> None:
    reach = tmp_path / "ssh"
    reach.write_text('#!/bin/sh\necho "$1" >> "$(dirname "$0")/reached"\ncd / && exec sh -c "$2"\n')
    reach.chmod(0o755)
    launcher = f"launcher: {{kind: torchrun, hostfile: nodes, ssh: {reach}, env: {{GREETING: hello world}}}}"
    file = study(tmp_path, KERNELS.replace("causal, full", "causal"), launcher=launcher)
    found = cells(run(file, "--json"))
    assert [cell["status"] for cell in found] == ["ok", "ok", "cannot run"]
    assert "flash_attn_interface" in found[2]["reason"]  # the node's own word, not known here before
    assert (tmp_path / "reached").read_text() == "node-a\n"


def test_slurm_gets_a_job_for_each_number_of_nodes(
    tmp_path: Path, here: Lcab, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = "launcher: {kind: slurm, gpus_per_node: 2, sbatch: [--partition=long], time: '00:30:00'}"
    file = study(tmp_path, TRAINING, launcher=launcher)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    status, written, _ = here(file)
    assert status == 0
    assert "There is no sbatch on this machine" in written
    one, two = (tmp_path / f"out/slurm/nodes{n}.sbatch" for n in (1, 2))
    assert subprocess.run(["bash", "-n", one, two]).returncode == 0
    text = two.read_text()
    for line in ("--nodes=2", "--gpus-per-node=2", "--partition=long", "--time=00:30:00"):
        assert f"#SBATCH {line}\n" in text
    assert "--launcher slurm --world 4\n" in text

    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "Submitted batch job $(basename "$1")"\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _, submitted, _ = here(file, "--json")
    assert [job["submitted"] for job in json.loads(submitted)] == [
        "Submitted batch job nodes1.sbatch",
        "Submitted batch job nodes2.sbatch",
    ]


SRUN = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/steps"
for word; do case $word in --ntasks=*) tasks=${word#--ntasks=} ;; esac; done
while [ "${1#--}" != "$1" ]; do shift; done
while [ "$((tasks -= 1))" -gt 0 ]; do "$@" & done
"$@" && wait
"""


def job(folder: Path, nodes: int, first: str) -> dict[str, str]:
    """The environment of a slurm job, with stand-ins for its commands; srun's starts all tasks here."""
    scontrol = f'#!/bin/sh\n[ "$*" = "show hostnames {first}-and-more" ] && echo {first} && echo node-more\n'
    for name, text in (("srun", SRUN), ("scontrol", scontrol)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    held = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": f"{first}-and-more"}
    return {**held, "SLURM_CPUS_ON_NODE": "2", "PATH": f"{folder}:{os.environ['PATH']}"}


def test_in_a_job_srun_starts_the_agents(tmp_path: Path) -> None:
    file = study(tmp_path, KERNELS.replace("causal, full", "full"), launcher="launcher: {kind: slurm}")
    found = cells(run(file, "--json", **job(tmp_path, 1, "node-a")))
    assert [cell["status"] for cell in found] == ["ok", "ok", "cannot run"]
    words = "--nodes=1 --ntasks=1 --ntasks-per-node=1 --relative=0 --cpus-per-task=2 --kill-on-bad-exit=1"
    assert (tmp_path / "steps").read_text().startswith(words)


@pytest.mark.nightly
def test_agents_of_a_job_meet_on_its_nodes(tmp_path: Path) -> None:
    launcher = "launcher: {kind: slurm, gpus_per_node: 1}"
    file = study(tmp_path, CP, launcher=launcher)
    found = cells(run(file, "--json", **job(tmp_path, 2, "localhost")))
    assert [cell["status"] for cell in found] == ["ok"]
    assert "--nodes=2 --ntasks=2" in (tmp_path / "steps").read_text()


def test_a_job_meets_at_its_first_node_wherever_the_study_runs(
    tmp_path: Path, here: Lcab, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = study(tmp_path, TRAINING, launcher="launcher: {kind: slurm, gpus_per_node: 2}")
    for name, value in job(tmp_path, 2, "node-a").items():
        monkeypatch.setenv(name, value)
    status, shown, _ = here(file, "--dry-run")
    assert status == 0
    assert shown.count("--rdzv-endpoint node-a:") == 2
    monkeypatch.setenv("SLURM_JOB_NODELIST", "nowhere")
    status, _, said = here(file, "--dry-run")
    assert status == 2
    assert "scontrol does not name the job's nodes nowhere" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--scale", "tinyy"], "unknown scale 'tinyy'; did you mean 'tiny'?"),
        (["--launcher", "slrum"], "unknown launcher 'slrum'; did you mean 'slurm'?"),
        (["--launcher", "torchrun"], "launcher 'torchrun' needs the nodes"),
        (["--launcher", "torchrun", "--hostfile", "none-such"], "cannot read the hostfile"),
        (["--world", "7"], "no cell has 7 ranks; --world is one of 1."),
    ],
)
def test_bad_words_are_one_sentence(tmp_path: Path, here: Lcab, words: list[str], sentence: str) -> None:
    status, out, error = here(study(tmp_path, KERNELS), *words)
    assert (status, out) == (2, "")
    assert sentence in error
