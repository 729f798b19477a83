"""A study file says what is wrong with it in one sentence, with the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcab_plugin.errors import LcabError
from lcab_plugin.study import document
from lcab_plugin.study.settings import CpSweep, load

GOOD = """\
name: sample
sweeps:
  - kind: kernels
    kernels: [naive]
    masks: [causal, full]
    seqlens: [64]
  - kind: cp
    kernels: [naive]
    strategies: [p2p, usp]
    degrees: [{ulysses: 2}]
    masks: [causal]
    worlds: [4, 8]
    seqlens_per_rank: [1024]
  - kind: training
    kernels: [naive]
    strategies: [none]
    masks: [causal]
    worlds: [2]
    seqlens: [128]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    study = load(write(tmp_path, GOOD))
    kernels, cp, training = study.sweeps
    assert (kernels.heads, kernels.kv_heads, kernels.head_dim, kernels.dtype) == (64, 8, 128, "bf16")
    assert isinstance(cp, CpSweep)
    assert cp.strategies == ["ring_p2p", "usp"]
    assert [cp.lengths(world) for world in cp.worlds] == [[4096], [8192]]
    assert training.strategies == ["none"]
    assert study.launcher.kind == "local"


def test_json_is_read_as_well(tmp_path: Path) -> None:
    study = load(write(tmp_path, GOOD))
    path = tmp_path / "study.json"
    path.write_text(json.dumps(study.model_dump(exclude_unset=True), indent=2))
    assert load(path) == study


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("masks: [causal, full]", "maskss: [causal]", "line 5: unknown key 'maskss'; did you mean 'masks'?"),
        ("name: sample", "name: sample\ncolour: red", "line 2: unknown key 'colour'; did you"),
        ("[causal, full]", "[causal, fulll]", "line 5: 'masks': unknown mask 'fulll'; did you mean 'full'?"),
        ("[{ulysses: 2}]", "[{ulyses: 2}]", "line 10: unknown key 'ulyses'; did you mean 'ulysses'?"),
        (
            "worlds: [4, 8]",
            "worlds: [4, eight]",
            "line 12: 'worlds' = 'eight': Input should be",
        ),
        ("worlds: [4, 8]", "worlds: [0]", "line 12: 'worlds' = 0: Input should be greater"),
        ("kind: cp", "kind: cpp", "line 7: a sweep needs kind: kernels, cp or training."),
        ("    seqlens: [64]\n", "", "line 3: 'seqlens' is missing."),
        ("    seqlens_per_rank: [1024]\n", "", "line 7: give one of seqlens and seqlens_per_rank."),
        ("[p2p, usp]", "[none]", "line 7: strategy 'none' is measured by `baseline: single`"),
        ("[{ulysses: 2}]", "[{ring: 2}]", "line 7: degrees of a cp sweep are ulysses, inner_ring"),
        ("kernels: [naive]", "kernels: [auto]", "line 4: 'kernels': 'auto' is for training sweeps, where"),
        ("[p2p, usp]", "[p2p, auto]", "line 7: 'auto' is for training sweeps, where the planner chooses"),
        ("[causal, full]", "[block_sparse]", "line 3: block_sparse needs blocks and keeps, such as"),
        ("[64]", "[64]\n    blocks: [8]", "line 3: blocks and keeps are of block_sparse, which is not among"),
        ("[64]", "[64]\n    keeps: [0]", "line 7: 'keeps' = 0: Input should be greater than 0"),
        ("[64]", "[64]\n    keeps: [1.5]", "line 7: 'keeps' = 1.5: Input should be less than or equal to 1"),
        ("name: sample", "name: sample\nname: again", "line 2: 'name' is given twice."),
        ("name: sample", "name: [", "is not YAML"),
        (GOOD, "- 1", "must hold a mapping with the keys name, device, launcher, sweeps."),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    with pytest.raises(LcabError) as error:
        load(write(tmp_path, GOOD.replace(old, new, 1)))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_scalars_mean_what_they_mean_in_json(tmp_path: Path) -> None:
    text = "a: 64:8\nb: yes\nc: none\nd: 1e-3\ne: '8'\nf: null\ng: true\nh: 04:00:00\ni: [1, -2.5]\n"
    found = document.read(write(tmp_path, text))
    expected = {"a": "64:8", "b": "yes", "c": "none", "d": 1e-3, "e": "8", "f": None, "g": True}
    assert found.value == {**expected, "h": "04:00:00", "i": [1, -2.5]}
    assert found.at(("i", 1)).endswith("line 9")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LcabError, match=r"cannot read .*nowhere\.yaml: No such file"):
        load(tmp_path / "nowhere.yaml")
