"""The stand-ins for absent libraries bind arguments as Python does, and the script that records the argument
lists reads what `inspect` would."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from kernels import published

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "published_signatures.py"

SOURCE = """
try:
    import nothing
except ImportError:
    def under_except(a): return a

if True:
    def forward(q, k, v=None, *rest, scale, causal=False, **more) -> "Tensor":
        def inner(): return 1
        if causal: return q, k
        return k, q

def forward_2(q): return q
def forward_2(q, k=1) -> Tuple[Tensor, Tensor, int]: return helper(q)
def endless(*, a) -> tuple[int, ...]: return helper()
def starred(a) -> Tuple[Tensor, ...]: return a, *a
def one(a) -> torch.Tensor: return helper(a)

class Op:
    @staticmethod
    def apply(x, /, y=2): return None, x, y
"""
FUNCTIONS = ("under_except", "forward", "forward_2", "endless", "starred", "one", "Op.apply")


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """What the script writes about ``SOURCE`` in a wheel."""
    wheel = tmp_path / "fast_attn-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("fast_attn/low/level.py", SOURCE)
    _script(tmp_path, *FUNCTIONS, f"--from-file={wheel}")
    return json.loads((tmp_path / "fast-attn.json").read_text())


def _script(out: Path, *functions: str) -> None:
    functions, options = functions[:-1], functions[-1:]
    command = [
        sys.executable,
        str(SCRIPT),
        "fast-attn==1.2",
        "--file",
        "fast_attn/low/level.py",
        "--url=here",
    ]
    subprocess.run([*command, f"--out={out}", *options, "--function", *functions], check=True)


def test_the_record_is_what_inspect_reads(record: dict[str, Any]) -> None:
    assert (record["library"], record["version"], record["url"]) == ("fast-attn", "1.2", "here")
    assert record["sha256_of"] == "fast_attn-1.2-py3-none-any.whl"
    assert list(record["functions"]) == list(FUNCTIONS)
    module: dict[str, Any] = {}
    future = "from __future__ import annotations\n"
    exec(future + SOURCE, module)
    for name, described in record["functions"].items():
        assert described["module"] == "fast_attn.low.level"
        function = module["Op"].apply if name == "Op.apply" else module[name]
        real = inspect.signature(function).parameters.values()
        ours = published.signature(described).parameters.values()
        named = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert [(p.name, p.default is p.empty) for p in ours] == [
            (p.name, p.default is p.empty) for p in real
        ]
        assert [p.kind in named or p.kind for p in ours] == [p.kind in named or p.kind for p in real]
    returns = {name: described["returns"] for name, described in record["functions"].items()}
    assert returns == dict(zip(FUNCTIONS, (None, 2, 3, None, None, 1, 3), strict=True))


def test_a_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = tmp_path / "level.py"
    source.write_text(SOURCE)
    with pytest.raises(subprocess.CalledProcessError):
        _script(tmp_path, "backward", f"--from-file={source}")
    assert not (tmp_path / "fast-attn.json").exists()


def test_a_stand_in_binds_like_the_function(monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]) -> None:
    given: list[dict[str, Any]] = []

    def forward(**arguments: Any) -> tuple[int, int]:
        given.append(arguments)
        return 1, 2

    calls = published.install(monkeypatch, "fast-attn", {"forward": forward}, record)
    library = importlib.import_module("fast_attn.low.level")
    assert library.forward(1, 2, scale=3) == (1, 2)
    assert given == [{"q": 1, "k": 2, "scale": 3}]
    assert [(c.function, c.arguments) for c in calls] == [("forward", given[0])]
    for wrong in ({}, {"q": 1, "k": 2}):
        with pytest.raises(TypeError):
            library.forward(**wrong)
    with pytest.raises(TypeError):
        library.forward_2(1, scale=3)
    with pytest.raises(AssertionError, match=r"no implementation of Op\.apply"):
        library.Op.apply(1)
    assert importlib.util.find_spec("fast_attn.low") is not None
    assert metadata.version("fast_attn") == "1.2"
    assert metadata.version("pytest") == pytest.__version__
    monkeypatch.undo()
    assert "fast_attn" not in sys.modules


def test_a_stand_in_checks_the_number_of_values(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]
) -> None:
    published.install(monkeypatch, "fast-attn", {"forward": lambda **_: (1, 2, 3)}, record)
    with pytest.raises(AssertionError, match="returns 2 values, not 3"):
        importlib.import_module("fast_attn.low.level").forward(1, 2, scale=3)


@pytest.mark.parametrize("path", sorted(published.FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_every_committed_record_says_where_it_is_from(path: Path) -> None:
    record = published.load(path.stem)
    assert record["library"] == path.stem
    assert record["url"].startswith("https://")
    assert re.fullmatch(r"[0-9a-f]{64}", record["sha256"])
    assert all(described["args"] for described in record["functions"].values())
