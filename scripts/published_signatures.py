#!/usr/bin/env python3
"""Writes tests/kernels/signatures/<library>.json: argument names of functions a library has published.

The package is read with `ast` and never imported, so this runs without a GPU and without the library.

    # a wheel or an sdist of the package index (pip decides which; --sdist asks for the sdist)
    python scripts/published_signatures.py flash-attn==2.8.3 --sdist \\
        --file flash_attn/flash_attn_interface.py --function _flash_attn_varlen_forward
    # one raw file of a tagged public source; --root is what precedes the importable path
    python scripts/published_signatures.py flash-attn-3 --version 3.0.0 --root hopper \\
        --file hopper/flash_attn_interface.py --function _flash_attn_forward \\
        --url https://raw.githubusercontent.com/Dao-AILab/flash-attention/<commit>/hopper/flash_attn_interface.py
    # a file already here, with the place it came from on record
    python scripts/published_signatures.py flash-attn==2.8.3 --from-file flash_attn-2.8.3.tar.gz \\
        --url https://pypi.org/project/flash-attn/2.8.3/ --file ... --function ...

`--file` and `--function` take several values; a function is looked for in every file, or in one when written
`path/of/file.py:function`; a method is `Class.method`. pip runs the setup.py of an sdist: where that asks for
a compiler, set what the package offers (flash-attn: FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE) and use a Python
that has torch, or download the archive by other means and pass --from-file.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "signatures"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Parse the command line, read the sources, write the file."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="published-") as scratch:
        _write(args, Path(scratch))


def _write(args: argparse.Namespace, scratch: Path) -> None:
    name, _, pinned = args.library.partition("==")
    if args.from_file is not None:
        origin = args.from_file
    elif args.url is not None:
        origin = _fetched(args.url, scratch)
    else:
        origin = _downloaded(args.library, args.sdist, scratch)
    version = args.version or pinned
    if not version or (args.from_file and not args.url):
        sys.exit("Name the version (library==version or --version) and, with --from-file, its --url.")
    sources = {path: _source(origin, path) for path in args.file}
    out = {
        "library": name,
        "version": version,
        "source": ", ".join(args.file),
        "url": args.url or f"https://pypi.org/project/{name}/{version}/",
        "sha256": hashlib.sha256(origin.read_bytes()).hexdigest(),
        "sha256_of": args.file[0].rpartition("/")[2] if args.url and not args.from_file else origin.name,
        "functions": dict(_described(wanted, sources, args.root) for wanted in args.function),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    path.write_text(json.dumps(out, indent=2) + "\n")
    print(f"{path}: {name} {version}, {len(out['functions'])} functions")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", help="name, or name==version")
    parser.add_argument("--version", help="where the name carries none")
    parser.add_argument("--file", nargs="+", action="extend", required=True, help="path in the archive")
    parser.add_argument("--function", nargs="+", action="extend", required=True, help="[file:]name")
    parser.add_argument("--root", default="", help="folder of --file that is no part of the module path")
    parser.add_argument("--sdist", action="store_true", help="download the sdist, not a wheel")
    parser.add_argument("--from-file", type=Path, help="an archive or a source file that is already here")
    parser.add_argument("--url", help="a raw source file; with --from-file: where that came from")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    return parser.parse_args()


def _downloaded(requirement: str, sdist: bool, folder: Path) -> Path:
    """The one archive that `pip download` leaves."""
    form = ["--no-binary", ":all:", "--no-build-isolation"] if sdist else ["--only-binary", ":all:"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", requirement, "--no-deps", *form, "--dest", str(folder)],
        check=True,
        stdout=sys.stderr,
    )
    (archive,) = folder.iterdir()
    return archive


def _fetched(url: str, folder: Path) -> Path:
    """The file at ``url``, kept under its own name."""
    path = folder / url.rpartition("/")[2]
    with urllib.request.urlopen(url) as answer:
        path.write_bytes(answer.read())
    return path


def _source(origin: Path, path: str) -> str:
    """The text of ``path`` in a wheel, an sdist (whose first folder is the package's) or the file itself."""
    if zipfile.is_zipfile(origin):
        with zipfile.ZipFile(origin) as wheel:
            return wheel.read(path).decode()
    if tarfile.is_tarfile(origin):
        with tarfile.open(origin) as sdist:
            for member in sdist:
                if member.name.partition("/")[2] == path and (stream := sdist.extractfile(member)):
                    return stream.read().decode()
        sys.exit(f"{origin.name} has no file {path}; list it with `tar -tf`.")
    return origin.read_text()


def _described(wanted: str, sources: dict[str, str], root: str) -> tuple[str, dict[str, Any]]:
    """Name and record of one function. The last definition counts, as at import."""
    only, _, name = wanted.rpartition(":")
    found: list[tuple[str, Function]] = []
    for path, text in sources.items():
        if only in ("", path):
            here = [f for n, f in _functions(ast.parse(text).body) if n == name]
            found += [(path, f) for f in here[-1:]]
    if len(found) != 1:
        sys.exit(
            f"{name} is defined in {len(found)} of {sorted(sources)}; write path/of/file.py:{name} of one."
        )
    path, function = found[0]
    module = (
        path.removeprefix(root.rstrip("/") + "/" if root else "")
        .removesuffix(".py")
        .removesuffix("/__init__")
    )
    return name, {"module": module.replace("/", "."), **signature(function)}


def _functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Functions of a module and methods of its classes, also under an ``if`` or a ``try``."""
    for node in body:
        if isinstance(node, Function):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "handlers", "orelse", "finalbody"):
                for part in getattr(node, field, []):
                    yield from _functions(
                        part.body if isinstance(part, ast.ExceptHandler) else [part], prefix
                    )


def signature(function: Function) -> dict[str, Any]:
    """Argument names as tests/kernels/published.py reads them; ``defaults`` counts the last of them."""
    a = function.args
    required = [arg.arg for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default is None]
    return {
        "args": [arg.arg for arg in (*a.posonlyargs, *a.args)],
        "defaults": len(a.defaults),
        "kwonly": [arg.arg for arg in a.kwonlyargs],
        "kwonly_required": required,
        "vararg": a.vararg.arg if a.vararg else None,
        "varkw": a.kwarg.arg if a.kwarg else None,
        "returns": _returned(function),
    }


def _returned(function: Function) -> int | None:
    """How many values every ``return`` (else the annotation) gives, or None where that cannot be read."""
    given = [n.value for n in _own_nodes(function) if isinstance(n, ast.Return) and n.value is not None]
    counts = {len(v.elts) if isinstance(v, ast.Tuple) and not _starred(v.elts) else None for v in given}
    if len(counts) == 1 and None not in counts:
        return counts.pop()
    match function.returns:
        case ast.Subscript(value=ast.Name(id="Tuple" | "tuple"), slice=ast.Tuple(elts=elements)):
            endless = any(isinstance(e, ast.Constant) and e.value is ... for e in elements)
            return None if endless else len(elements)
        case ast.Attribute(attr="Tensor") | ast.Name(id="Tensor"):
            return 1
    return None


def _starred(elements: list[ast.expr]) -> bool:
    return any(isinstance(e, ast.Starred) for e in elements)


def _own_nodes(function: Function) -> Iterator[ast.AST]:
    """Nodes of the body without those of functions defined inside."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            todo += ast.iter_child_nodes(node)


if __name__ == "__main__":
    main()
