"""Unified diffs applied exactly: every line of context must be there, once, in order."""

from __future__ import annotations

from dataclasses import dataclass

from lcab_plugin.errors import LcabError


@dataclass(frozen=True)
class Hunk:
    """One change: the lines it finds and the lines it leaves, context included."""

    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class FilePatch:
    """The changes of one file, ``path`` relative to the root of the checkout."""

    path: str
    hunks: tuple[Hunk, ...]

    def reversed(self) -> FilePatch:
        """The changes that undo these."""
        return FilePatch(self.path, tuple(Hunk(h.after, h.before) for h in self.hunks))

    def apply(self, text: str) -> str | None:
        """``text`` changed; None where a hunk's lines are not in it exactly once after the hunk before."""
        lines = text.splitlines(keepends=True)
        done: list[str] = []
        for hunk in self.hunks:
            size = len(hunk.before)
            at = [i for i in range(len(lines) - size + 1) if tuple(lines[i : i + size]) == hunk.before]
            if len(at) != 1:
                return None
            done += [*lines[: at[0]], *hunk.after]
            lines = lines[at[0] + size :]
        return "".join([*done, *lines])


def parse(diff: str) -> list[FilePatch]:
    """The files of a unified diff with ``a/`` and ``b/`` before their paths.

    Raises:
        LcabError: a line that does not belong there.
    """
    files: list[FilePatch] = []
    hunks: list[tuple[list[str], list[str]]] = []
    for number, line in enumerate(diff.splitlines(keepends=True), 1):
        if line.startswith("--- a/"):
            continue
        if line.startswith("+++ b/"):
            hunks = []
            files.append(FilePatch(line.removeprefix("+++ b/").rstrip("\n"), ()))
        elif line.startswith("@@ -"):
            hunks.append(([], []))
        elif hunks and line[0] in " -+":
            before, after = hunks[-1]
            if line[0] != "+":
                before.append(line[1:])
            if line[0] != "-":
                after.append(line[1:])
        else:
            raise LcabError(f"line {number} of the patch is no part of a unified diff: {line.rstrip()!r}")
        if files:
            files[-1] = FilePatch(files[-1].path, tuple(Hunk(tuple(b), tuple(a)) for b, a in hunks))
    return files
