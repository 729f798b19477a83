"""What a study expands into, and which cells are known not to run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lcab_plugin import masks
from lcab_plugin.errors import LcabError
from lcab_plugin.study.cells import Cell, expand
from lcab_plugin.study.launch import Launch, program
from lcab_plugin.study.nodes import Cluster, Node, read_hostfile
from lcab_plugin.study.run import Runner
from lcab_plugin.study.scale import tiny
from lcab_plugin.study.settings import Study, load

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/studies").glob("*.yaml"))
SHARED = {"kernels": ["naive"], "masks": ["causal"], "worlds": [4], "seqlens": [512]}


def cells(sweep: dict[str, object], launcher: str = "slurm") -> list[Cell]:
    asked = {"name": "x", "device": "cpu", "launcher": {"kind": launcher, "gpus_per_node": 4}}
    study = Study.model_validate({**asked, "sweeps": [sweep]})
    return expand(study, Cluster(study, ROOT).place)


def test_the_product_of_all_axes() -> None:
    found = cells(
        {
            "kind": "cp",
            "kernels": ["naive", "sdpa_flash"],
            "masks": ["causal", "full"],
            "strategies": ["ring_p2p", "ulysses", "usp"],
            "degrees": [{"ulysses": 2}, {"ulysses": 4}],
            "worlds": [4, 8],
            "seqlens_per_rank": [256, 512],
        }
    )
    # a ring has no Ulysses degree, so that it appears once for both
    by_strategy = Counter(cell.strategy for cell in found)
    assert by_strategy == {"ring_p2p": 16, "ulysses": 32, "usp": 32}
    assert len({cell.id for cell in found}) == len(found)
    assert {(cell.world, cell.seqlen) for cell in found} == {(4, 1024), (4, 2048), (8, 2048), (8, 4096)}


def test_cells_of_a_turn_differ_in_their_kernel_or_strategy_alone() -> None:
    sweep = {
        "kind": "kernels",
        "kernels": ["naive", "flex"],
        "masks": ["causal", "full"],
        "seqlens": [64, 128],
    }
    assert sorted(Counter(cell.turn for cell in cells(sweep)).values()) == [2, 2, 2, 2]
    sweep = {"kind": "cp", **SHARED, "strategies": ["ring_p2p", "group_cast", "ulysses"]}
    assert list(Counter(cell.turn for cell in cells(sweep)).values()) == [3]
    sweep = {"kind": "training", **SHARED, "strategies": ["ring_p2p", "group_cast"]}
    assert list(Counter(cell.turn for cell in cells(sweep)).values()) == [1, 1]


def test_blocks_and_shares_are_axes_of_block_sparse_alone(tmp_path: Path) -> None:
    sweep = {"kind": "kernels", "kernels": ["naive", "flex"], "masks": ["causal", "block_sparse"]}
    found = cells(sweep | {"seqlens": [64], "blocks": [8, 16], "keeps": [0.1, 1]})
    assert len({cell.id for cell in found}) == len(found) == 2 + 2 * 2 * 2
    assert sorted(Counter(cell.turn for cell in found).values()) == [2] * 5  # the kernels of one mask
    assert [cell.parameters for cell in found[:4:2]] == [{}, {"block": 8, "keep": 0.1}]
    assert "block_sparse-b8-k0.1-64" in found[2].id
    words = program(Launch(tuple(found[2:4])), tmp_path, "cpu")
    assert words[words.index("--blocks") + 1] == "8"
    assert words[words.index("--keeps") + 1] == "0.1"
    assert "--blocks" not in program(Launch(tuple(found[:2])), tmp_path, "cpu")


def test_an_inner_ring_is_asked_of_the_bench_where_there_is_one(tmp_path: Path) -> None:
    sweep = {"kind": "cp", **SHARED, "strategies": ["loongtrain", "usp"], "degrees": [{"inner_ring": 2}]}
    double, single = cells(sweep)
    assert (double.degrees, single.degrees) == ({"inner_ring": 2}, {})
    assert double.turn != single.turn
    words = program(Launch((double,)), tmp_path, "cpu")
    assert words[words.index("--inner-ring") + 1] == "2"
    assert "--inner-ring" not in program(Launch((single,)), tmp_path, "cpu")


def test_auto_is_handed_to_the_training_script(tmp_path: Path) -> None:
    asked = {"kernels": ["auto"], "strategies": ["auto", "usp"], "degrees": [{"ulysses": 2}, {"ulysses": 4}]}
    auto, *named = cells({"kind": "training", **SHARED, **asked, "layouts": ["auto"]}, "local")
    assert [(cell.kernel, cell.strategy, cell.layout) for cell in (auto, named[0])] == [
        ("auto", "auto", "auto"),
        ("auto", "usp", "auto"),
    ]
    assert auto.degrees == {}  # it chooses its own: one cell for both
    assert [cell.degrees for cell in named] == [{"ulysses": 2}, {"ulysses": 4}]
    words = program(Launch((auto,)), tmp_path, "cpu")
    given = {flag: words[words.index(flag) + 1] for flag in ("--kernel", "--strategy", "--layout")}
    assert set(given.values()) == {"auto"}


CP = {"kind": "cp", **SHARED}
TRAINING = {"kind": "training", **SHARED}


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        (
            CP | {"strategies": ["ulysses"], "worlds": [96]},
            "64 query heads and 8 key/value heads cannot be dealt",
        ),
        (CP | {"strategies": ["usp"], "degrees": [{"ulysses": 3}]}, "ulysses=3 does not divide 4 ranks"),
        (
            CP | {"strategies": ["loongtrain"], "degrees": [{"inner_ring": 3}]},
            "inner_ring=3 does not divide 4 ranks",
        ),
        (CP | {"strategies": ["ring_p2p"], "worlds": [6]}, "6 ranks do not fill nodes of 4 GPUs"),
        (TRAINING | {"strategies": ["usp"]}, "does not make 4 ranks; give degrees whose product is 4"),
        (TRAINING | {"strategies": ["ulysses"], "degrees": [{"ulysses": 3}]}, "do not divide 4 ranks"),
        (
            TRAINING | {"strategies": ["none"], "global_batch": 6},
            "6 does not divide into 4 data-parallel shares",
        ),
        (
            TRAINING | {"strategies": ["ring_p2p"], "frameworks": ["megatron"], "layouts": ["striped"]},
            "Megatron's RoPE slices sequences by zigzag",
        ),
        (
            TRAINING
            | {
                "strategies": ["ring_p2p"],
                "frameworks": ["megatron"],
                "degrees": [{"ring": 2}],
                "arguments": {"megatron": ["--tensor-parallel", "4"]},
            },
            "4 model- x 2 context-parallel ranks do not divide 4 ranks",
        ),
    ],
)
def test_what_cannot_run_says_why(sweep: dict[str, object], reason: str) -> None:
    (cell,) = cells(sweep)
    assert reason in str(cell.reason)


def test_a_kernel_that_this_machine_has_not_is_known_before_a_local_launch() -> None:
    sweep = {"kind": "kernels", "kernels": ["naive", "fa3"], "masks": ["causal"], "seqlens": [64]}
    local, elsewhere = cells(sweep, "local"), cells(sweep, "slurm")
    assert local[0].reason is None
    assert "fa3" in str(local[1].reason)
    assert [cell.reason for cell in elsewhere] == [None, None]
    assert [cell.id for cell in local] == [cell.id for cell in elsewhere]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_expand_and_shrink(path: Path) -> None:
    study = load(path)
    whole = expand(study, Cluster(study, path.parent).place)
    small_study = tiny(study)
    small = expand(small_study, Cluster(small_study, path.parent).place)
    assert {(c.mask, *c.parameters.items()) for c in small} == {
        (c.mask, *c.parameters.items()) for c in whole
    }
    assert {cell.strategy for cell in small} == {cell.strategy for cell in whole}
    assert max(cell.world for cell in small) <= 2
    assert max(cell.seqlen for cell in small) == 512
    assert any(cell.reason is None for cell in small)


def test_the_benchmark_is_what_its_paper_says() -> None:
    kernels, sparse, cp = (
        load(ROOT / f"examples/studies/{n}.yaml").sweeps
        for n in ("kernels", "block_sparse", "context_parallel")
    )
    for sweep in (*kernels, *sparse, *cp):
        assert (sweep.heads, sweep.kv_heads, sweep.head_dim, sweep.dtype) == (64, 8, 128, "bf16")
    asked = {(mask, n): sweep.documents for sweep in kernels for mask in sweep.masks for n in sweep.seqlens}
    assert {mask for mask, _ in asked} | set(sparse[0].masks) == set(masks.names())
    for mask in masks.names():
        if mask != "block_sparse":
            assert {k << 10 for k in (1, 2, 4, 8, 16, 24, 32, 40, 48)} <= {n for m, n in asked if m == mask}
    for (mask, n), documents in asked.items():
        if masks.needs_lengths(mask):
            assert documents == ("pile" if n <= 12 << 10 else "prolong64k")
    assert (sparse[0].seqlens, sparse[0].blocks) == ([16384, 49152], [64, 128])
    assert sparse[0].keeps == [0.1, 0.2, 0.5, 0.8, 1.0]
    for sweep in cp:
        assert sweep.seqlens_per_rank == [8192]
        assert (min(sweep.worlds), max(sweep.worlds)) == (8, 96)
        assert {"full", "causal", "full_document", "causal_document"} <= set(sweep.masks)
        assert sweep.documents == "prolong512k_long"


def test_a_hostfile_places_ranks(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=8\n# spare\nb slots=8  # second\n\nc slots=4\n")
    launcher = {"kind": "torchrun", "hostfile": "hosts"}
    sweep = {"kind": "kernels", "kernels": ["naive"], "masks": ["full"], "seqlens": [64]}
    study = Study.model_validate({"name": "x", "launcher": launcher, "sweeps": [sweep]})
    place = Cluster(study, tmp_path).place
    assert place(3) == [Node("a", 3)]
    assert place(16) == [Node("a", 8), Node("b", 8)]
    assert place(20)[-1] == Node("c", 4)
    for world in (12, 21):
        with pytest.raises(LcabError, match=f"{world} ranks do not fill the hostfile node by node"):
            place(world)


def test_a_job_runs_the_worlds_that_fit_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = {"kind": "training", **SHARED, "strategies": ["ring_p2p"], "worlds": [4, 8, 16]}
    asked = {"name": "x", "launcher": {"kind": "slurm", "gpus_per_node": 4}, "sweeps": [sweep]}
    study = Study.model_validate(asked)
    assert Runner(study, tmp_path, ROOT).worlds == [4, 8, 16]
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    runner = Runner(study, tmp_path, ROOT)
    assert runner.worlds == [4, 8]
    assert [cell.reason for cell in runner.cells] == [None, None, None]
    assert Runner(study, tmp_path, ROOT, [8]).worlds == [8]


@pytest.mark.parametrize("text", ["a slots=x", "a slots=0", "a", "a slots=1\na slots=1", ""])
def test_a_hostfile_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(LcabError, match="slots=8"):
        read_hostfile(path)


def test_the_cluster_examples_have_twelve_nodes_of_eight() -> None:
    nodes = read_hostfile(ROOT / "scripts/hostfile/hostfile")
    assert [node.slots for node in nodes] == [8] * 12
    for path in (ROOT / "scripts/slurm").glob("*.sbatch"):
        text = path.read_text()
        assert "#SBATCH --nodes=12\n" in text
        assert "#SBATCH --gpus-per-node=8\n" in text
