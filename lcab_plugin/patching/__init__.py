"""Patches for frameworks whose own slots do not reach a place: recognising, applying and reverting them."""

from lcab_plugin.patching.releases import PATCHES, Patch, State, find
from lcab_plugin.patching.unified import FilePatch, Hunk, parse

__all__ = ["PATCHES", "FilePatch", "Hunk", "Patch", "State", "find", "parse"]
