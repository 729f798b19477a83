"""A folder that looks like a Megatron-LM checkout to `lcab patch`."""

from __future__ import annotations

from pathlib import Path

UPSTREAM = Path(__file__).parent / "upstream"
RELEASES = {"core_v0.16.1": "0.16.1", "core_v0.19.0": "0.19.1"}  # tag: what it calls itself


def text(tag: str) -> str:
    """pretrain_gpt.py of a tag."""
    return (UPSTREAM / f"{tag}.pretrain_gpt.txt").read_text()


def checkout(folder: Path, tag: str, version: str | None = None) -> Path:
    """The files that the patch of ``tag`` reads, with that version's number or another."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    parts = (version or RELEASES[tag]).split(".")
    pre = parts[3] if len(parts) > 3 else ""
    lines = [f"{name} = {part}" for name, part in zip(("MAJOR", "MINOR", "PATCH"), parts, strict=False)]
    (core / "package_info.py").write_text("\n".join([*lines, f"PRE_RELEASE = '{pre}'", ""]))
    (folder / "pretrain_gpt.py").write_text(text(tag))
    return folder
