"""The `lcab` command as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lcab_plugin
from lcab_plugin.bench import parity
from lcab_plugin.cli import main

ROOT = Path(__file__).parents[2]


Lcab = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lcab:
    """The command in this process: words -> exit status, stdout, stderr."""

    def lcab(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcab", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return lcab


def test_version(run: Lcab) -> None:
    assert run("--version") == (0, f"lcab_plugin {lcab_plugin.__version__}\n", "")


def test_every_kernel_is_listed(run: Lcab) -> None:
    status, out, _ = run("kernels", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert tuple(rows) == lcab_plugin.kernels.names()
    assert rows["naive"]["reason"] is None
    assert rows["naive"]["version"].startswith("torch ")
    _, table, _ = run("kernels")
    assert all(name in table for name in rows)


def test_every_mask_is_listed(run: Lcab) -> None:
    _, out, _ = run("masks", "list", "--json")
    assert tuple(row["name"] for row in json.loads(out)) == lcab_plugin.masks.names()
    _, table, _ = run("masks", "list")
    assert "j <= i." in table


def test_a_mask_is_shown(run: Lcab) -> None:
    status, out, _ = run("masks", "show", "causal_document", "--seqlen", "6", "--lengths", "4,2")
    assert status == 0
    assert "13 visible pairs, 36.11% of all, in 2 slices" in out
    picture = [line for line in out.splitlines() if "█" in line][:6]
    assert [line.count("██") for line in picture] == [1, 2, 3, 4, 1, 2]
    _, out, _ = run("masks", "show", "causal_document", "--seqlen", "6", "--lengths", "4,2", "--json")
    assert json.loads(out)["slices"] == [[0, 4, 0, 4, None, 0], [4, 6, 4, 6, None, 0]]


def test_document_lengths_are_sampled_where_none_are_given(run: Lcab) -> None:
    _, out, _ = run("masks", "show", "full_document", "--seqlen", "1000", "--seed", "3", "--json")
    lengths = lcab_plugin.masks.sample_lengths(1000, "pile", 3)
    assert json.loads(out)["area"] == sum(n * n for n in lengths)


def test_masks_are_drawn(run: Lcab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("masks", "draw", "causal_document", "share_question", "--seqlen", "512")
    assert status == 0
    pictures = ["causal_document-512.svg", "share_question-512.svg"]
    assert [line for line in out.splitlines() if line.endswith(".svg")] == pictures
    assert all((tmp_path / name).read_text().startswith("<svg") for name in pictures)
    families = ("causal", "block_sparse", "sliding_window_causal")
    words = ("--seqlen", "512", "--block", "64", "--keep", "0.3", "--left", "40", "--out", "there", "--json")
    _, out, _ = run("masks", "draw", *families, *words)
    rows = json.loads(out)
    assert [row["picture"] for row in rows] == [f"there/{name}-512.svg" for name in families]
    assert rows[1]["digest"] == lcab_plugin.masks.block_sparse(512, 64, 0.3, seed=0).digest
    assert rows[2]["digest"] == lcab_plugin.masks.sliding_window_causal(512, 40).digest
    assert run("masks", "draw", "causal", "--seqlen", "64", "--out", "one.svg")[0] == 0
    assert (tmp_path / "one.svg").exists()
    status, _, err = run("masks", "draw", "causal", "full", "--left", "3")
    assert (status, "none of causal, full takes left; leave --left out." in err) == (2, True)


def test_sparse_blocks_are_drawn_by_the_seed(run: Lcab) -> None:
    words = ("masks", "show", "block_sparse", "--seqlen", "640", "--block", "64", "--keep", "0.3", "--json")
    _, out, _ = run(*words, "--seed", "3")
    assert json.loads(out)["digest"] == lcab_plugin.masks.block_sparse(640, 64, 0.3, seed=3).digest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("masks", "show", "cusal"), "error: unknown mask 'cusal'; did you mean 'causal'?"),
        (("masks", "show", "sliding_window"), "error: mask 'sliding_window' takes left, right"),
        (("masks", "show", "causal_document", "--lengths", "1,2"), "must sum to n = 4096"),
        (
            ("masks", "show", "block_sparse", "--keep", "0.5"),
            "'block_sparse' takes block, keep, seed besides n, but was given keep, seed and not block.",
        ),
        (
            ("masks", "show", "block_sparse", "--block", "64", "--keep", "0"),
            "error: keep must be a number above",
        ),
        (("bench", "kernels", "--device", "gpu"), "error: device 'gpu' is none of auto, cpu, cuda."),
        (("bench", "kernels", "--out", "x.csv"), "give a name ending in .jsonl"),
        (("bench", "kernels", "--out", "/"), "cannot write /: Is a directory; give another --out."),
        (("bench", "kernels", "--cell-seconds", "nan"), "error: cell_seconds nan must be above 0."),
        (("bench", "kernels", "--dense-gib", "-1"), "error: dense_gib -1.0 must be at least 0."),
        (("parity", "--kernels", "nave"), "error: unknown kernel 'nave'; did you mean 'naive'?"),
        (("parity", "--masks", ","), "names nothing; give names separated by commas"),
        (("parity", "--device", "gpu"), "error: device 'gpu' is none of auto, cpu, cuda."),
        (("parity", "--script", "none.py"), "error: none.py does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(run: Lcab, words: tuple[str, ...], message: str) -> None:
    status, out, err = run(*words)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


def test_wrong_usage_is_status_2(run: Lcab) -> None:
    status, _, err = run("masks", "show", "causal_document", "--lengths", "one,two")
    assert status == 2
    assert "1000,3096" in err


def test_mask_work_is_measured(run: Lcab) -> None:
    small = ("--tokens", "4096", "--documents", "20", "--ranks", "4", "--repeats", "1")
    status, out, _ = run("bench", "masks", *small, "--json")
    assert status == 0
    assert all(row["median_ms"] > 0 for row in json.loads(out))
    _, table, _ = run("bench", "masks", *small)
    assert "20 documents, 4096 tokens" in table


def test_the_doctor_finds_a_machine_that_can_train(run: Lcab) -> None:
    status, out, _ = run("doctor", "--json")
    lines = {line["what"]: line for line in json.loads(out)}
    assert status == 0
    assert all(lines[what]["ok"] for what in ("python", "torch", "gloo", "kernel naive"))
    _, table, _ = run("doctor")
    assert "an all-reduce ran" in table


def test_parity_prints_one_table_and_fails_by_its_exit_status(
    run: Lcab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A script that trains nothing: every run writes the same records, but for kernel sdpa_math.
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "loss = 1.5 if flags['--kernel'] == 'sdpa_math' else 1.0\n"
        "step = {'type': 'step', 'loss': loss, 'grad_norm': 1.0, 'step_ms': 1.0, 'peak_memory_gib': 1.0,\n"
        "        'tokens_per_s': 1.0, 'batch_digest': ''}\n"
        "lines = [json.dumps({**step, 'step': i}) for i in range(int(flags['--steps']))]\n"
        "Path(flags['--out'], flags['--name'], 'metrics.jsonl').write_text('\\n'.join(lines))\n"
        "torch.save({'w': torch.ones(1)}, flags['--save-gradients'])\n"
    )
    common = ("parity", "--script", str(script), "--strategies", "none", "--masks", "causal", "--steps", "2")
    common = (*common, "--world", "1")
    status, out, err = run(*common, "--kernels", "sdpa_flash", "--out", str(tmp_path / "same"))
    assert status == 0, err
    assert "PASS: 2 pass" in out
    assert str(tmp_path / "same") in out
    assert "2/2 causal-sdpa_flash-none" in err

    status, out, _ = run(*common, "--kernels", "sdpa_math", "--out", str(tmp_path / "other"), "--json")
    result = json.loads(out)
    assert status == 1
    assert result["passed"] is False
    assert result["cells"][1]["problems"] == [
        "loss in the first 10 steps deviates by 5.0e-01 (budget 1.0e-05)"
    ]

    train, trained = parity._train, []

    def stopped(cell: parity.Cell, *rest: Any) -> Any:
        trained.append(cell)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(cell, *rest)

    monkeypatch.setattr(parity, "_train", stopped)
    status, out, _ = run(*common, "--kernels", "sdpa_flash", "--out", str(tmp_path / "stopped"))
    assert status == 130
    assert "STOPPED, 1 of 2 runs are kept: 1 pass" in out
    assert str(tmp_path / "stopped") in out
    kept = json.loads((tmp_path / "stopped" / "parity.json").read_text())
    assert (kept["asked"], len(kept["cells"]), kept["passed"]) == (2, 1, False)


def test_the_command_starts_without_the_libraries_it_does_not_need() -> None:
    code = (
        "import sys\n"
        "from lcab_plugin.cli.app import app\n"
        "print(*(m for m in ('deepspeed', 'transformers', 'matplotlib') if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.stdout.split(), result.stderr) == ([], "")
