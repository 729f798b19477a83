"""Our Triton kernel without a GPU: interpreted, compiled, its plans painted, its table of launches read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import families, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

import lcab_plugin as lcab
from lcab_plugin import masks
from lcab_plugin.kernels import KernelOptions
from lcab_plugin.kernels.triton import tuning
from lcab_plugin.kernels.triton.plan import Plan, largest_load
from lcab_plugin.kernels.triton.tuning import Config

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent


def test_under_the_interpreter():
    """Forward and backward of every mask, in a process where Triton interprets."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_triton.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def resources():
    import triton
    from kernels import triton_resources

    table = json.loads(triton_resources.TABLE.read_text())
    return triton_resources, table["configurations"] if table["triton"] == triton.__version__ else None


def _cells():
    from kernels import triton_resources

    return list(triton_resources.cells())


@pytest.mark.parametrize("cell", _cells(), ids=lambda c: f"sm{c[3]}-{c[2]}-{c[0]}-d{c[1]}-{c[4]}")
def test_every_configuration_compiles(cell, resources):
    """For the architecture it is meant for: within its shared memory, on its tensor cores, with next to no
    spills where it is a default, and as the committed table says (for the Triton that wrote it)."""
    module, table = resources
    which, width, dtype, arch, config, default = cell
    found = module.compile_cell(which, width, dtype, arch, config)
    assert found["shared"] <= module.SHARED_LIMIT[arch]
    if dtype == "bf16":
        assert found["wgmma"] if config.tma and config.keys >= 64 else found["wgmma"] + found["mma"]
    if default:
        # dk and dv of head_dim 128 keep four products of 64 rows in registers on Hopper.
        most = 112 if which == "dkv" and width == 128 and config.specialised else 96
        assert found["local"] <= most, "a default spills more registers than was measured to pay"
    assert not found["serialised"], "products wait for each other that were to overlap"
    if table is not None:
        assert found == table[module.name(*cell[:5])], "run python tests/kernels/triton_resources.py"


def painted(plan: Plan, q_len: int, k_len: int, rows: int, keys: int) -> np.ndarray:
    """The cells that the kernels would compute: FULL blocks whole, PARTIAL ones where an interval says so of
    those that stay in registers, or else of those that the run is said to reach."""
    lines, runs, starts, stops = (x.numpy() for x in plan.tensors)
    column = np.arange(k_len)
    seen = np.zeros((q_len, k_len), dtype=int)
    within = (column >= starts[..., None]) & (column < stops[..., None])
    for block, full, partial, end, count in lines:
        assert count == runs[full:partial, 1].sum(), "FULL blocks of the line"
        own = slice(block * rows, (block + 1) * rows)
        for run in range(full, end):
            first, length, low, high = runs[run]
            read = slice(0, plan.kept) if plan.kept else slice(low, high)
            span = slice(first * keys, (first + length) * keys)
            if run < partial:
                assert (first + length) * keys <= k_len, "a FULL block without bounds passes the end"
                seen[own, span] += 1
            else:
                seen[own, span] += within[read, own, span].any(0)
    return seen


@given(
    name=st.sampled_from(masks.names()),
    n=st.integers(96, 150),
    rows=st.sampled_from([16, 32]),
    keys=st.sampled_from([16, 32]),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_a_plan_is_its_mask(name, n, rows, keys, data):
    q0, k0 = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    mask = families(n)[name].local([range(q0, n)], [range(k0, n)])
    for one in (mask, mask.transposed()):
        plan = Plan(one, rows, keys, torch.device("cpu"))
        seen = painted(plan, one.q_len, one.k_len, rows, keys)
        np.testing.assert_array_equal(seen, one.to_dense().int().numpy())
        work = [int(plan.tensors[1][a:b, 1].sum()) for _, a, _, b, _ in plan.lines.tolist()]
        assert work == sorted(work, reverse=True), "the heaviest rows start first"
        assert not any(x.storage_offset() % 4 for x in plan.tensors), "each mask would have kernels compiled"
    torch.testing.assert_close(mask.transposed().to_dense(), mask.to_dense().T)


@given(
    q_len=st.integers(1, 90),
    k_len=st.integers(1, 90),
    keep=st.sampled_from([0.1, 0.4, 0.8]),
    cell=st.sampled_from([1, 5, 16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_a_plan_of_rows_of_many_intervals_is_its_mask(q_len, k_len, keep, cell, seed):
    """Though a run reads few of them: in cells at random, where rows beside each other see different keys."""
    kept = np.random.default_rng(seed).random((-(-q_len // cell), -(-k_len // cell))) < keep
    dense = torch.from_numpy(kept.repeat(cell, 0).repeat(cell, 1)[:q_len, :k_len])
    plan = Plan(masks.from_dense(dense), 32, 16, torch.device("cpu"))
    np.testing.assert_array_equal(painted(plan, q_len, k_len, 32, 16), dense.int().numpy())


def test_a_run_reads_the_intervals_that_reach_it():
    """Of the up to 64 of a row: those of its place, give or take how far the rows of a line differ."""
    plan = Plan(masks.block_sparse(4096, block=16, keep=0.25, seed=0), 64, 64, torch.device("cpu"))
    _, runs, starts, _ = (x.numpy() for x in plan.tensors)
    runs = runs[runs[:, 1] > 0]
    assert len(starts) == 64
    assert np.mean((runs[:, 3] - runs[:, 2]) / np.maximum(1, runs[:, 1])) < 2


@given(
    name=st.sampled_from(masks.names()),
    n=st.integers(300, 700),
    group=st.sampled_from([1, 3, 4, 8]),
    units=st.integers(1, 6),
    programs=st.sampled_from([1, 7, 132]),
)
@settings(max_examples=150, deadline=None)
def test_the_parts_of_a_plan_are_its_lines(name, n, group, units, programs):
    plan = Plan(families(n)[name].transposed(), 64, 32, torch.device("cpu"))
    parts = plan.parts(group, units, programs)
    table, lines = parts.table.numpy(), len(plan.lines)
    assert np.all(np.diff(plan.work[table[:, 0]] * table[:, 2]) <= 0), "the heaviest parts start first"
    summed = np.zeros((lines, group), int)
    for line, head, count, slot in table:
        summed[line, head : head + count] += 1
        assert (slot < 0) == (count == group)
    assert np.all(summed == 1), "each line is summed once over each query head"
    split = table[table[:, 3] >= 0]
    order = np.argsort(split[:, 3])
    np.testing.assert_array_equal(split[order, 3], np.arange(parts.slots))
    np.testing.assert_array_equal(split[order, 0], np.repeat(np.arange(parts.split), parts.each))


def test_lines_that_hold_up_a_launch_are_split():
    """Keys that every row sees: the largest load falls from several times the mean; an even mask stays."""
    question, cpu = masks.share_question([512] * 32).transposed(), torch.device("cpu")
    plan = Plan(question, 128, 64, cpu)
    line, _, count, _ = plan.parts(8, 8, 132).table.numpy().T
    mean = plan.work.sum() * 8 * 8 / 132
    assert largest_load(plan.work * 8, 8, 132) > 2 * mean
    assert largest_load(plan.work[line] * count, 8, 132) < 1.2 * mean
    assert not Plan(masks.full(16384), 128, 64, cpu).parts(8, 8, 132).slots
    assert not Plan(question, 128, 64, cpu, spare=2).parts(8, 8, 132).slots, (
        "a graph's table may be another's"
    )


def test_split_lines_are_added_up():
    """At a length that ends within a line, with columns of padding."""
    from lcab_plugin.kernels.triton.launch import add_parts

    b, heads, length, d = 2, 3, 700, 5
    plan = Plan(masks.full(length), 64, 32, torch.device("cpu"))
    parts = plan.parts(32, b * heads, 1000)
    assert int(parts.rows.max()) == length - 1
    sums = torch.randn(parts.slots, b * heads, 64, 8)
    target = torch.zeros(b, length, heads, d)
    add_parts(target, sums, parts)
    want = torch.zeros_like(target)
    for line, _, _, slot in parts.table.tolist():
        first = int(plan.lines[line, 0]) * 64
        if slot >= 0:
            rows = want[:, first : first + 64]
            rows += sums[slot].view(b, heads, 64, 8).transpose(1, 2)[:, : rows.shape[1], :, :d]
    torch.testing.assert_close(target, want)


def test_heads_go_through_the_table_together_as_far_as_the_cache_reaches(monkeypatch):
    """All where their keys and values take at most twice the cache, else whole heads that share the units."""
    from lcab_plugin.kernels.triton import launch

    monkeypatch.setattr(launch, "_cache_size", lambda device: 60 * 2**20)
    for batch, tokens, heads, each, together in (
        (1, 16384, 8, 4, 32),  # 64 MiB
        (1, 32768, 8, 4, 4),  # 16 MiB a head
        (1, 2**20, 8, 4, 4),
        (2, 16384, 8, 4, 8),  # 8 MiB a head: three fit, two share 16 evenly
        (64, 4096, 2, 1, 8),
        (3, 40960, 1, 3, 9),
    ):
        k = torch.empty(batch, tokens, heads, 128, dtype=torch.bfloat16, device="meta")
        assert launch._together(k, k, batch * heads * each) == together, (batch, tokens)


def shape(**change):
    given = {
        "which": "forward",
        "capability": (9, 0),
        "d": 128,
        "dv": 128,
        "dtype": torch.bfloat16,
        "group": 8,
        "mask": "dense",
        "length": 4096,
    }
    return tuning.Shape(**(given | change))


def test_a_launch_is_looked_up_by_shape_and_never_by_mask():
    assert tuning.candidates(shape())[0] == tuning.HOPPER["forward", 128][0]
    assert tuning.candidates(shape(mask="sparse"))[0] == tuning.HOPPER["forward", 128][1]
    assert tuning.candidates(shape(mask="patchy"))[0] == Config(64, 64, 4, 3, True)
    assert tuning.candidates(shape(d=96))[0] == tuning.HOPPER["forward", 128][0]
    assert tuning.candidates(shape(d=96, dv=192))[0] == tuning.HOPPER["forward", 256][0]
    assert not tuning.candidates(shape(capability=(8, 6)))[0].tma
    assert tuning.candidates(shape(dtype=torch.float32))[0] == tuning.FLOAT32["forward", 128][0]
    assert tuning.is_dense(masks.causal(4096))
    assert not tuning.is_dense(masks.sliding_window_causal(4096, 128))


def test_blocks_chosen_one_by_one_get_lines_of_their_height(monkeypatch):
    """Where groups of warps share a line, most blocks of 64 would be of one group alone."""
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))

    def lines(mask, which, heads=8, d=128):
        q, k, v, dout = inputs(mask.q_len, mask.k_len, heads, 1, d, torch.bfloat16, batch=1)
        config = tuning.choose(which, q, k, v, (dout, q, k, v), mask, KernelOptions(1.0))
        return config.specialised, config.keys if which == "dkv" else config.rows

    patchy = masks.block_sparse(2048, block=64, keep=0.1, seed=0)
    for d in (64, 128):
        assert lines(patchy, "dkv", d=d) == (False, 64)
        assert lines(masks.block_sparse(2048, block=128, keep=0.1, seed=0), "dkv", d=d)[0]
        assert lines(masks.share_question([64] * 32), "dkv", d=d)[0]
    assert lines(patchy, "forward") == (True, 64), "pairs of heads own the same 64 rows"
    for which in ("forward", "dq"):
        assert lines(patchy, which, heads=7) == (False, 64)
        assert lines(masks.causal(2048), which, heads=7)[0]


def test_findings_outlive_the_process(tmp_path):
    path = tmp_path / "deep" / "triton.json"
    assert tuning.read(path) == {}
    tuning.write({"a": Config(64, 64, 4, 3, True)}, path)
    tuning.write({"b": Config(32, 64, 4, 2)}, path)
    assert tuning.read(path) == {"a": Config(64, 64, 4, 3, True), "b": Config(32, 64, 4, 2, False, False)}
    assert [p.name for p in path.parent.iterdir()] == ["triton.json"]
    path.write_text("{half")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tuning.read(path) == {}


def test_unaligned_tensors_are_not_given_to_the_tensor_memory_accelerator():
    k = inputs(64, 64, 2, 1, 64, torch.bfloat16)[1]
    assert tuning.describable(k)
    moved = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    assert not tuning.describable(moved)
    assert not tuning.describable(k.expand(-1, -1, 4, -1))  # one head for four
    assert not tuning.describable(k[..., :60])  # nor could a contiguous one of this shape be


def test_it_says_why_it_does_not_run():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    q, k, v, _ = inputs(64, 64, 2, 1, 64, torch.float32)
    assert "CUDA GPU" in lcab.kernels.availability()["triton"]
    with pytest.raises(lcab.UnsupportedError, match="needs a CUDA GPU"):
        lcab.attention(q, k, v, masks.causal(64), kernel="triton")
    kernel = lcab.kernels.get("triton")
    for x, options, reason in (
        (q.double(), KernelOptions(1.0), "not float64"),
        (q, KernelOptions(-1.0), "must be positive, not -1.0"),
        (q.repeat(1, 1, 1, 5), KernelOptions(1.0), "at most 256, not 320"),
    ):
        assert reason in kernel.unsupported(x, x, x, masks.causal(64), options, False)
