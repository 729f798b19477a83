"""The report of records made by hand: what it shows, what it says is missing, and that it is one file."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lcab_plugin import masks, report
from lcab_plugin.errors import LcabError
from lcab_plugin.report import pictures, svg
from tests.report.made_records import RUN, cp_cell, kernel_cell, parity, training_run, write

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Tags that are closed as they were opened, ids that are unique, links that lead somewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.links += [value[1:]] if name == "href" and value.startswith("#") else []
            if name in ("src", "href", "data") and not value.startswith("#"):
                self.outside.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def folder(tmp_path):
    cells = [kernel_cell(k, n, ms * n) for k, ms in (("naive", 0.2), ("triton", 0.1)) for n in (64, 128)]
    write(tmp_path / "k.jsonl", [RUN, *cells, kernel_cell("fa4", 64, None)])
    ranks = [cp_cell(s, w, 8 / w) for s in ("ring_p2p", "ulysses") for w in (2, 4)]
    write(tmp_path / "cp" / "cp.jsonl", [RUN, *ranks])
    write(tmp_path / "runs" / "a" / "metrics.jsonl", training_run("naive", [5.0, 4.0, 3.0]))
    write(tmp_path / "runs" / "b" / "metrics.jsonl", training_run("triton", [5.0, 4.0004, 3.0]))
    (tmp_path / "runs" / "parity.json").write_text(json.dumps(parity("cannot run", "no <GPU> here")))
    return tmp_path


def made(folder, out=None):
    """The report of a folder: its page, its Markdown and what was written."""
    written = report.write(report.load(folder), out or folder / "report", "Test <runs>")
    return written.page.read_text(), written.markdown.read_text(), written


def table(written, name):
    """Rows of a table's CSV, {column: field}."""
    path = next(path for path in written.csv if path.name == f"{name}.csv")
    return list(csv.DictReader(path.open(newline="")))


def test_the_page_is_whole_and_asks_for_nothing_from_elsewhere(folder):
    page, _, _ = made(folder)
    checked = Checker(page)
    assert len(set(checked.ids)) == len(checked.ids)
    assert set(checked.links) - set(checked.ids) == set()
    assert checked.outside == []
    assert not re.search(r"url\(|@import|<script|https?:", page)
    assert "Test &lt;runs&gt;" in page


def test_a_matrix_has_the_value_or_the_reason(folder):
    _, markdown, written = made(folder)
    (row,) = table(written, "kernels-1-fwd-64")
    cell = kernel_cell("triton", 64, 6.4)
    assert float(row["triton"]) == pytest.approx(cell["tflops"])
    assert row["fa4"] == "unsupported: no | 64"
    assert "unsupported [1]" in markdown
    assert "1. unsupported: no \\| 64" in markdown


def test_the_best_of_a_mask_is_set_apart(folder):
    _, markdown, _ = made(folder)
    assert f"**{svg.number(kernel_cell('triton', 64, 6.4)['tflops'])}**" in markdown
    assert f"| {svg.number(kernel_cell('naive', 64, 12.8)['tflops'])} |" in markdown


def test_scaling_is_drawn_against_ranks_with_the_same_sequence(folder):
    page, _, _ = made(folder)
    assert "scaling efficiency, the same sequence on more ranks" in page
    assert "ring_p2p, 4: 0.5" in page  # a point's tooltip


def test_a_strategy_is_one_line_though_its_degrees_follow_the_ranks(tmp_path):
    cells = [cp_cell("usp", w, 8 / w, degrees={"ulysses": 2, "ring": w // 2}) for w in (4, 8, 16)]
    write(tmp_path / "cp.jsonl", [RUN, *cells])
    page, markdown, written = made(tmp_path)
    assert page.count("usp, 16: 0.5") == 1
    assert page.count('class="line s0" points=') == 3  # speed, efficiency, bytes; no bars of single points
    assert 'class="f0" x=' not in page
    assert [row[""] for row in table(written, "cp-1-speed-fwd-16-1024")] == ["usp"]
    assert "| usp | 2x8 zigzag 2 |" in markdown


def test_a_strategy_is_one_row_though_its_layout_follows_the_mask(tmp_path):
    window = masks.sliding_window_causal(1024, 128)
    other = {"mask": "sliding_window_causal", "parameters": {"left": 128}, "digest": window.digest}
    cells = [cp_cell("ring_p2p", 2, 4.0), cp_cell("ring_p2p", 2, 2.0, layout="contiguous", **other)]
    write(tmp_path / "cp.jsonl", [RUN, *cells])
    page, _, written = made(tmp_path)
    (row,) = table(written, "cp-1-speed-fwd-2-1024")
    assert row == {"": "ring_p2p", "causal": "0.25", "sliding_window_causal": "0.5"}
    assert '<span class="aside">contiguous</span> 0.5' in page
    write(tmp_path / "two.jsonl", [RUN, cp_cell("ring_p2p", 2, 8.0, layout="contiguous")])
    _, _, written = made(tmp_path)  # now two layouts compete under one mask
    rows = table(written, "cp-1-speed-fwd-2-1024")
    assert [row[""] for row in rows] == ["ring_p2p contiguous", "ring_p2p zigzag"]
    assert [row["causal"] for row in rows] == ["0.125", "0.25"]


def test_the_mask_of_many_cells_is_made_once(folder, monkeypatch):
    pictures._rebuilt.cache_clear()
    made_masks = []
    known = masks.from_name
    monkeypatch.setattr(masks, "from_name", lambda *a, **k: made_masks.append(a) or known(*a, **k))
    cells = [kernel_cell(f"k{i}", 64, 1.0, hardware="NVIDIA H100 80GB HBM3") for i in range(20)]
    made_masks.clear()
    write(folder / "k.jsonl", [RUN, *cells])
    shutil.rmtree(folder / "cp")
    made(folder)
    assert len(made_masks) <= 2  # that, and the training runs' causal


def test_volume_counted_and_by_formula_are_compared(folder):
    write(folder / "cp" / "off.jsonl", [RUN, cp_cell("group_cast", 2, 4.0, closed_form_bytes=7)])
    _, _, written = made(folder)
    rows = table(written, "cp-volume")
    assert [r["equal"] for r in rows if r["strategy"].startswith("group_cast")] == ["False"]
    assert {r["equal"] for r in rows if not r["strategy"].startswith("group_cast")} == {"True"}


def test_losses_deviate_from_the_naive_run_on_the_same_tokens(folder):
    page, _, written = made(folder)
    (row,) = table(written, "training-deviations-1")
    assert (row["run"], row["steps compared"]) == ("triton", "3")
    assert float(row["loss, largest"]) == pytest.approx(1e-4)
    assert "relative deviation of the loss" in page
    write(folder / "runs" / "c" / "metrics.jsonl", training_run("flex", [5.0, 4.1, 3.0]))
    page, _, _ = made(folder)
    assert "median of the deviations, their band</li>" in page  # what is drawn is in the legend


def test_without_naive_the_baseline_is_pytorch_s_own_kernel_in_the_precision_of_most(tmp_path):
    def run(kernel, dtype, strategy="none"):
        lines = training_run(kernel, [5.0, 4.0], dtype=dtype, name=f"{kernel} {dtype} {strategy}")
        lines[0]["attention"]["strategy"] = strategy
        write(tmp_path / f"{kernel}-{dtype}-{strategy}" / "metrics.jsonl", lines)

    run("cudnn", "bf16")
    run("sdpa_efficient", "fp32")
    run("sdpa_flash", "bf16", "ring_p2p")
    run("sdpa_flash", "bf16")
    page, _, _ = made(tmp_path)
    assert "Relative deviations from sdpa_flash bf16 none" in page


def test_runs_on_other_tokens_are_not_compared_number_by_number(folder):
    lines = training_run("flex", [5.0, 9.0, 3.0])
    lines[2]["batch_digest"] = "other"
    write(folder / "runs" / "c" / "metrics.jsonl", lines)
    _, _, written = made(folder)
    rows = {r["run"]: r for r in table(written, "training-deviations-1")}
    assert (rows["flex"]["steps compared"], float(rows["flex"]["loss, largest"])) == ("2", 0.0)


def test_accuracy_by_position_and_distance(folder):
    page, _, written = made(folder)
    assert [r["16"] for r in table(written, "training-accuracy-1-recall")] == ["0.5", "0.5"]
    assert [r["2"] for r in table(written, "training-accuracy-1-by-document-position")] == ["", ""]
    assert "tokens back" in page
    (first, _) = table(written, "training-memory")
    assert (first["resident on the host"], first["activations"]) == ("0.6", "")


def test_what_a_mask_loses_is_seen_beside_what_another_keeps(folder):
    lines = training_run("windowed", [5.0, 4.1, 3.1])
    lines[0]["attention"]["mask"] = "sliding_window_causal"
    lines[-1]["recall"]["accuracy"] = [0.75, 0.0]
    write(folder / "runs" / "w" / "metrics.jsonl", lines)
    page, _, written = made(folder)
    rows = {(r["run"], r["mask"]): r["16"] for r in table(written, "training-accuracy-1-recall")}
    assert rows["windowed", "sliding_window_causal"] == "0.0"
    assert rows["naive", "causal"] == "0.5"
    (figure,) = [f for f in page.split("<figure>") if "Recall of a hidden value" in f]
    assert "causal, naive, 16: 0.5" in figure  # in one chart
    assert "sliding_window_causal, windowed, 16: 0" in figure


def test_verdicts_have_a_word_and_a_sign_and_their_reason(folder):
    page, markdown, _ = made(folder)
    assert "! cannot run [1]" in markdown
    assert "no &lt;GPU&gt; here" in page


def test_a_comparison_that_was_stopped_has_not_passed(folder):
    (folder / "runs" / "parity.json").write_text(json.dumps({**parity(), "asked": 3, "passed": False}))
    _, markdown, _ = made(folder)
    assert "1 stopped" in markdown
    assert "runs/parity.json: stopped, 2 pass" in markdown


def test_a_mask_is_drawn_if_it_is_the_recorded_one(folder):
    page, _, _ = made(folder)
    assert 'class="mask"' in page
    write(folder / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0, digest="another")])
    shutil.rmtree(folder / "cp")
    page, _, written = made(folder)
    assert 'class="mask"' not in page
    assert table(written, "masks-drawn")[0]["picture"] == "False"


def test_every_block_and_share_of_block_sparse_is_a_row(tmp_path):
    cells = []
    for block, keep in ((128, 1.0), (64, 1.0), (64, 0.5), (64, 0.1)):
        parameters = {"block": block, "keep": keep, "seed": 0}
        mask = masks.from_name("block_sparse", 1024, **parameters)
        named = {"mask": "block_sparse", "parameters": parameters, "digest": mask.digest, "area": mask.area}
        cells.append(kernel_cell("naive", 1024, 1.0, **named))
    write(tmp_path / "k.jsonl", [RUN, *cells, kernel_cell("naive", 1024, 1.0)])
    page, _, written = made(tmp_path)
    rows = [row[""] for row in table(written, "kernels-1-fwd-1024")]
    pairs = ((64, 0.1), (64, 0.5), (64, 1), (128, 1))
    assert rows == ["causal", *(f"block_sparse block {block} keep {keep}" for block, keep in pairs)]
    assert {row["mask"] for row in table(written, "kernels-cells")} == set(rows)
    assert page.count('class="mask"') == 5
    assert all(row["picture"] == "True" for row in table(written, "masks-drawn"))


def test_a_mask_is_drawn_at_a_length_that_a_picture_shows(tmp_path):
    lengths = (1 << 14, 1 << 16, 1 << 20)
    write(tmp_path / "k.jsonl", [RUN, *(kernel_cell("naive", n, 1.0) for n in lengths)])
    page, _, written = made(tmp_path)
    assert [row["tokens"] for row in table(written, "masks-drawn")] == ["65536"]
    assert "causal, 64K tokens, 50.0% visible" in page
    cells = []
    for n in (4096, 16384, 65536):  # 147, 2352 and 37532 slices
        parameters = {"block": 128, "keep": 0.2, "seed": 0}
        digest = masks.block_sparse(n, **parameters).digest
        cells.append(
            kernel_cell(
                "naive", 128, 1.0, mask="block_sparse", parameters=parameters, digest=digest, seqlen=n
            )
        )
    write(tmp_path / "k.jsonl", [RUN, *cells])
    page, _, written = made(tmp_path)
    assert [row["tokens"] for row in table(written, "masks-drawn")] == ["4096"]
    assert "lighter where some" not in page


def test_runs_of_one_length_and_world_are_bars(folder):
    page, _, _ = made(folder)
    figures = page.split("<figure>")
    (speed,) = [f for f in figures if "tokens/s: " in f]
    assert "naive none deepspeed fp32 100" in speed
    assert "causal, 2 ranks, 64 tokens" in speed


def test_of_cells_measured_twice_the_last_counts(folder):
    write(folder / "again.jsonl", [RUN, kernel_cell("naive", 64, 99.0, time=2.0)])
    _, _, written = made(folder)
    times = [
        r["median ms"]
        for r in table(written, "kernels-cells")
        if (r["kernel"], r["tokens"]) == ("naive", "64")
    ]
    assert times == ["99.0"]


def test_files_that_cannot_be_read_are_named_and_the_rest_is_shown(folder):
    (folder / "noise.jsonl").write_bytes(bytes(range(128, 256)))
    (folder / "empty.jsonl").write_text("")
    write(folder / "bad.jsonl", [RUN, {**kernel_cell("naive", 64, 1.0), "seqlen": None}])
    page, _, written = made(folder)
    assert [name for name, _ in written.unreadable] == ["bad.jsonl", "noise.jsonl"]
    assert "2 of 8 files cannot be read" in page
    assert "kernels has no seqlen" in page


def test_the_overview_has_the_largest_noise_of_each_machine(tmp_path):
    noise = [{**RUN, "noise_empty_ms": ms, "noise_same_relative": 0.03 / ms} for ms in (0.5, 1.5)]
    other = {**RUN, "device": "another", "noise_empty_ms": 0.1, "noise_same_relative": 0.01}
    for i, run in enumerate([*noise, other, RUN]):
        write(tmp_path / f"{i}.jsonl", [run, kernel_cell("naive", 64, 1.0)])
    _, markdown, written = made(tmp_path)
    rows = [list(row.values()) for row in table(written, "overview-noise")]
    assert rows == [["a machine", "2", "1.5", "0.06"], ["another", "1", "0.1", "0.01"]]
    assert markdown.index("Noise floor") < markdown.index("## Kernels")


def test_the_overview_counts_medians_that_are_not_known_as_asked(tmp_path):
    run = {**RUN, "limits": {"relative_ci": 0.02}}
    intervals = (0.01, 0.05, None)
    cells = [kernel_cell("naive", 64 * (i + 1), 1.0, relative_ci=ci) for i, ci in enumerate(intervals)]
    write(tmp_path / "k.jsonl", [run, *cells])
    page, _, written = made(tmp_path)
    (row,) = table(written, "overview-records")
    assert row["medians not known as asked"] == "2"
    assert "2 (to 2%)" in page


def test_memory_is_the_device_s_or_else_what_was_resident_on_the_host(folder):
    page, _, written = made(folder)
    assert "Peak device memory, forward" in page
    assert "resident on the host, all of" not in page
    resident = {"peak_memory_gib": None, "peak_rss_gib": 0.7}
    cells = [kernel_cell("naive", n, 1.0, **resident) for n in (64, 128)]
    write(folder / "k.jsonl", [RUN, *cells])
    write(folder / "cp" / "cp.jsonl", [RUN, *(cp_cell("ring_p2p", w, 1.0, **resident) for w in (2, 4))])
    page, _, written = made(folder)
    assert "Peak device memory" not in page
    assert "Peak memory resident on the host, all of the process, forward" in page
    assert "Forward: memory resident on the host, all of a process, the same sequence on more ranks" in page
    assert {row["resident GiB"] for row in table(written, "kernels-cells")} == {"0.7"}


def test_one_record_is_a_report(tmp_path):
    write(tmp_path / "k.jsonl", [RUN, kernel_cell("naive", 64, 1.0)])
    page, _, _ = made(tmp_path)
    Checker(page)
    assert '<rect class="f0"' in page  # a bar: one point is no line


def test_a_thousand_records_stay_a_small_page(tmp_path):
    cells = [kernel_cell(f"k{k}", 64 * (n + 1), 1.0 + k) for k in range(20) for n in range(50)]
    write(tmp_path / "k.jsonl", [RUN, *cells])
    for i in range(60):
        write(
            tmp_path / str(i) / "metrics.jsonl", training_run(f"k{i}", [5.0 - s / 1000 for s in range(1000)])
        )
    page, _, written = made(tmp_path)
    Checker(page)
    assert len(page) < 3_000_000
    assert len(table(written, "kernels-cells")) == 1000
    assert "48 more runs" in page


def test_a_loss_that_is_no_number_is_a_gap(tmp_path):
    write(tmp_path / "metrics.jsonl", training_run("naive", [5.0, float("nan"), 3.0]))
    page, _, _ = made(tmp_path)
    Checker(page)
    assert "NaN" not in page.replace("nan", "NaN").split("<svg", 1)[1].split("</svg>", 1)[0]


def test_a_study_shows_how_its_cells_ended(tmp_path):
    cell = {
        "type": "study_cell",
        "id": "a",
        "kind": "kernels",
        "mask": "causal",
        "seqlen": 64,
        "kernel": "fa4",
    }
    cells = [{**cell, "status": "ok"}, {**cell, "id": "b", "status": "oom", "reason": "80 GiB"}]
    write(tmp_path / "study.jsonl", [RUN, *cells, {**cell, "id": "c", "status": None}])
    _, markdown, _ = made(tmp_path)
    assert "study.jsonl: 3 cells; 1 ok, 1 oom, 1 not yet" in markdown


@pytest.mark.parametrize(("name", "why"), [("none", "does not exist"), ("", "holds no records")])
def test_no_records_are_one_sentence(tmp_path, name, why):
    with pytest.raises(LcabError, match=why):
        report.load(tmp_path / name)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="NOT TESTED in a browser: no chromium on the PATH")
def test_a_browser_lays_it_out(folder):
    page, _, written = made(folder)
    probe = (
        "<script>document.title=JSON.stringify([document.documentElement.scrollWidth<=innerWidth,"
        "document.querySelectorAll('svg.chart').length,[...document.querySelectorAll('svg.chart')]"
        ".every(s=>s.getBoundingClientRect().width>100),getComputedStyle(document.body).fontSize])</script>"
    )
    written.page.write_text(page.replace("</body>", probe + "</body>"))
    found = {}
    for width in (1280, 420):
        words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
        done = subprocess.run(
            [*words, "--dump-dom", written.page.as_uri()], capture_output=True, text=True, timeout=120
        )
        found[width] = json.loads(re.search(r"<title>(.*?)</title>", done.stdout).group(1))
    count = page.count('class="chart"')
    assert found[1280] == [True, count, True, "15px"]  # nothing sticks out, every chart is drawn
    assert found[420][0] is True  # nor on a telephone: tables scroll in their boxes
