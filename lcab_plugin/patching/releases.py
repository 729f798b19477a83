"""The patches that there are, which releases they are for, and the state of a checkout."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lcab_plugin.errors import LcabError
from lcab_plugin.patching.unified import FilePatch, parse

ROOT = Path(__file__).parents[2] / "patches"
_VERSION = Path("megatron/core/package_info.py")


class State(Enum):
    """How the files of a checkout stand to a patch."""

    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    CHANGED = "not applicable: a file that it touches is neither as released nor patched"


@dataclass(frozen=True)
class Patch:
    """A patch of ``patches/<folder>`` and the versions, by their own words, that it is for."""

    folder: str
    versions: tuple[str, ...]
    name: str = "pretrain_gpt.patch"

    def files(self) -> list[FilePatch]:
        """Its changes.

        Raises:
            LcabError: this package does not run from a checkout, which alone has ``patches/``.
        """
        path = ROOT / self.folder / self.name
        try:
            return parse(path.read_text())
        except OSError:
            raise LcabError(
                f"there is no {path.relative_to(ROOT.parent)} beside the package; run lcab patch from a "
                "checkout of lcab_plugin (pip install --editable)"
            ) from None

    def state(self, target: Path) -> State:
        """Whether the checkout in ``target`` has the changes, all of them, none, or something else."""
        states = {self._state(target, file) for file in self.files()}
        return states.pop() if len(states) == 1 else State.CHANGED

    def _state(self, target: Path, file: FilePatch) -> State:
        text = _read(target / file.path)
        if file.reversed().apply(text) is not None:
            return State.APPLIED
        return State.CHANGED if file.apply(text) is None else State.NOT_APPLIED

    def apply(self, target: Path, revert: bool = False) -> bool:
        """Make (or undo) the changes in ``target``; False where nothing was to be done.

        Raises:
            LcabError: a file that is neither as released nor patched; nothing is written then.
        """
        state = self.state(target)
        if state is (State.NOT_APPLIED if revert else State.APPLIED):
            return False
        files = [file.reversed() if revert else file for file in self.files()]
        texts = {target / file.path: file.apply(_read(target / file.path)) for file in files}
        changed = [str(path) for path, text in texts.items() if text is None]
        if changed:
            raise LcabError(
                f"{', '.join(changed)} is neither as released nor patched, so {self.folder} cannot be "
                f"{'reverted' if revert else 'applied'}; nothing was written: undo the changes around the "
                f"lines that patches/{self.folder}/{self.name} names"
            )
        for path, text in texts.items():
            _write(path, text or "")
        return True


PATCHES = (
    Patch("megatron-lm-core_v0.16.1", ("0.16.1",)),
    # The tag core_v0.19.0 calls itself 0.19.1; 0.19.2 has the same megatron/training.
    Patch("megatron-lm-core_v0.19.0", ("0.19.0", "0.19.1", "0.19.2")),
)


def find(target: Path) -> tuple[str, Patch]:
    """The version of the Megatron-LM checkout in ``target``, and its patch.

    Raises:
        LcabError: no such checkout, or a version without a patch.
    """
    version = _version(target)
    for patch in PATCHES:
        if version in patch.versions:
            return version, patch
    known = ", ".join(v for patch in PATCHES for v in patch.versions)
    raise LcabError(
        f"{target} is Megatron-LM {version}, for which there is no patch (there are for {known}); "
        "examples/pretrain_gpt_lcab.py needs none"
    )


def _version(target: Path) -> str:
    """``MAJOR.MINOR.PATCH`` and a pre-release's name, as megatron/core/package_info.py spells them."""
    try:
        text = (target / _VERSION).read_text()
    except OSError:
        raise LcabError(
            f"{target} is no checkout of Megatron-LM: it has no {_VERSION}; give the folder of "
            "pretrain_gpt.py"
        ) from None
    fields = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) *= *['\"]?(\w*)", text, re.MULTILINE))
    if not {"MAJOR", "MINOR", "PATCH"} <= fields.keys():
        raise LcabError(f"{target / _VERSION} says no version; give a checkout of a release of Megatron-LM")
    return ".".join(fields[k] for k in ("MAJOR", "MINOR", "PATCH")) + fields.get("PRE_RELEASE", "")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise LcabError(
            f"cannot read {path}: {error.strerror}; a wheel of megatron-core has no scripts: give a "
            "checkout of Megatron-LM"
        ) from None


def _write(path: Path, text: str) -> None:
    """All of it or nothing, with the file's permissions."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(text.encode())
        os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
