"""Every patch applies to the release it is for and to nothing else, and comes off again."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lcab_plugin import patching
from lcab_plugin.errors import LcabError
from lcab_plugin.patching import State
from tests.patches.upstream_files import RELEASES, checkout, text


@pytest.mark.parametrize("tag", RELEASES)
def test_a_patch_goes_on_and_comes_off(tmp_path: Path, tag: str) -> None:
    target = checkout(tmp_path, tag)
    script = target / "pretrain_gpt.py"
    script.chmod(0o755)
    version, patch = patching.find(target)
    assert (version, patch.folder) == (RELEASES[tag], f"megatron-lm-{tag}")
    assert patch.state(target) is State.NOT_APPLIED
    assert not patch.apply(target, revert=True)
    assert patch.apply(target)
    assert patch.state(target) is State.APPLIED
    applied = script.read_text()
    ast.parse(applied)
    assert "@lcab.with_masks\ndef forward_step(" in applied
    assert not patch.apply(target)
    assert script.read_text() == applied
    assert patch.apply(target, revert=True)
    assert script.read_text() == text(tag)
    assert script.stat().st_mode & 0o777 == 0o755
    assert sorted(p.name for p in target.iterdir()) == ["megatron", "pretrain_gpt.py"]


@pytest.mark.parametrize("tag", RELEASES)
def test_other_changes_stay(tmp_path: Path, tag: str) -> None:
    target = checkout(tmp_path, tag)
    script = target / "pretrain_gpt.py"
    mine = text(tag).replace("SPIKY_LOSS_FACTOR = 10", "# mine\nSPIKY_LOSS_FACTOR = 20")
    script.write_text(mine)
    _, patch = patching.find(target)
    assert patch.apply(target)
    assert "SPIKY_LOSS_FACTOR = 20" in script.read_text()
    assert patch.apply(target, revert=True)
    assert script.read_text() == mine


@pytest.mark.parametrize("tag", RELEASES)
def test_a_changed_place_is_refused(tmp_path: Path, tag: str) -> None:
    target = checkout(tmp_path, tag)
    script = target / "pretrain_gpt.py"
    changed = text(tag).replace("def is_dataset_built_on_rank(", "def is_dataset_built_on_this_rank(")
    script.write_text(changed)
    _, patch = patching.find(target)
    assert patch.state(target) is State.CHANGED
    for revert in (False, True):
        with pytest.raises(LcabError, match=r"neither as released nor patched.*nothing was written"):
            patch.apply(target, revert)
    assert script.read_text() == changed


def test_other_releases_have_no_patch(tmp_path: Path) -> None:
    for number, version in enumerate(("0.18.2", "0.16.0", "0.16.1.rc0", "0.20.0")):
        target = checkout(tmp_path / str(number), "core_v0.16.1", version)
        with pytest.raises(LcabError, match=r"for which there is no patch.*examples/pretrain_gpt_lcab\.py"):
            patching.find(target)
    with pytest.raises(LcabError, match="is no checkout of Megatron-LM"):
        patching.find(tmp_path)
    (target / "megatron/core/package_info.py").write_text("")
    with pytest.raises(LcabError, match="says no version"):
        patching.find(target)


def test_what_is_no_diff_is_refused() -> None:
    with pytest.raises(LcabError, match="line 2 of the patch"):
        patching.parse("--- a/x\nrename from x\n")
    hunk = patching.parse("--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n")[0]
    assert hunk.apply("a\nb\n") == "a\nc\n"
    assert hunk.apply("a\nb\na\nb\n") is None, "two places"
    assert hunk.reversed().apply("a\nc\n") == "a\nb\n"
