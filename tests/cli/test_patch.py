"""`lcab patch` as a user types it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lcab_plugin.cli import main
from tests.patches.upstream_files import checkout


def test_check_apply_revert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = checkout(tmp_path, "core_v0.16.1")
    told = "Megatron-LM 0.16.1: megatron-lm-core_v0.16.1"

    def lcab(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcab", "patch", "--target", str(target), *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    assert lcab() == (1, f"{told} is not applied.\n", "")
    assert lcab("--revert") == (0, f"{told} was not applied.\n", "")
    assert lcab("--apply") == (0, f"{told} is applied.\n", "")
    assert lcab("--apply") == (0, f"{told} was applied already.\n", "")
    assert lcab("--check") == (0, f"{told} is applied.\n", "")
    assert lcab("--revert") == (0, f"{told} is reverted.\n", "")
    status, out, error = lcab("--apply", "--revert")
    assert (status, out) == (2, "")
    assert "give one of them" in error
    (target / "pretrain_gpt.py").write_text("import torch\n")
    status, out, _ = lcab("--check")
    assert (status, out.count("neither as released nor patched")) == (2, 1)
    (target / "pretrain_gpt.py").unlink()
    assert "a wheel of megatron-core has no scripts" in lcab("--check")[2]
