"""Writes signatures/<library>.json for a library whose functions are bound in C++, from its published source.

The same record as ``scripts/published_signatures.py`` makes of Python sources, read by ``published.py``. Two
kinds of binding are read, neither compiled: pybind11 (``.def("name", &Class::name, py::arg("q"), ...)``) and
torch's (``m.def("name(Tensor q, ...) -> ...")``, recorded with its ``schema``)::

    python tests/kernels/bindings.py nvidia-cudnn-frontend 1.23.0 --module cudnn --class pygraph \\
        --url https://github.com/NVIDIA/cudnn-frontend/tree/v1.23.0 \\
        --file python/pygraph/sdpa.cpp --function sdpa sdpa_backward

``--file`` lies below the current folder or ``--root``, a checkout of that tag.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "signatures"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library")
    parser.add_argument("version")
    parser.add_argument("--module", required=True, help="where Python finds the functions")
    parser.add_argument("--class", dest="owner", help="the class whose methods they are")
    parser.add_argument("--url", required=True, help="the tagged source")
    parser.add_argument("--root", type=Path, default=Path())
    parser.add_argument("--file", required=True)
    parser.add_argument("--function", nargs="+", required=True)
    args = parser.parse_args()
    content = (args.root / args.file).read_bytes()
    prefix = f"{args.owner}." if args.owner else ""
    record = {
        "library": args.library,
        "version": args.version,
        "source": args.file,
        "url": args.url,
        "sha256": hashlib.sha256(content).hexdigest(),
        "sha256_of": args.file.rpartition("/")[2],
        "functions": {
            prefix + name: {"module": args.module, **described(content.decode(), name)}
            for name in args.function
        },
    }
    (FOLDER / f"{args.library}.json").write_text(json.dumps(record, indent=2) + "\n")


def described(text: str, name: str) -> dict[str, Any]:
    """The record of one bound function."""
    if found := re.search(rf'm\.def\(\s*("{name}\(.*?)\);', text, re.DOTALL):
        return _schema(found[1])
    found = re.search(rf'\.def\("{name}",(.*?)(?:\.def\(|\Z)', text, re.DOTALL)
    if found is None:
        raise SystemExit(f"{name} is not bound in this file.")
    arguments = re.findall(r'py::arg(_v)?\s*[({]"(\w+)"', found[1])
    required = [argument for optional, argument in arguments if not optional]
    assert [argument for _, argument in arguments[: len(required)]] == required
    array = re.search(rf"std::array<[^;{{}}]*?,\s*(\d+)>\s*\w+::{name}\(", text)
    return {
        "args": [argument for _, argument in arguments],
        "defaults": len(arguments) - len(required),
        "kwonly": [],
        "kwonly_required": [],
        "vararg": None,
        "varkw": None,
        "returns": int(array[1]) if array else 1,
    }


def _schema(literals: str) -> dict[str, Any]:
    """A schema of torch's, of C++ string literals on several lines."""
    lines = (line for line in literals.splitlines() if not line.strip().startswith("//"))
    text = re.sub(r"\s+", " ", "".join(re.findall(r'"([^"]*)"', "".join(lines))))
    schema = torch._C.parse_schema(text)
    return {
        "schema": str(schema),
        "args": [argument.name for argument in schema.arguments],
        "defaults": sum(argument.has_default_value() for argument in schema.arguments),
        "kwonly": [],
        "kwonly_required": [],
        "vararg": None,
        "varkw": None,
        "returns": len(schema.returns),
    }


if __name__ == "__main__":
    main()
