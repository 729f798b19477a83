"""`lcab patch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lcab_plugin.errors import LcabError


def patch(
    target: Annotated[Path, typer.Option(help="Root of a Megatron-LM checkout, where pretrain_gpt.py is.")],
    check: Annotated[bool, typer.Option("--check", help="Say how it stands (without any option).")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Make the changes.")] = False,
    revert: Annotated[bool, typer.Option("--revert", help="Undo them.")] = False,
) -> None:
    """Give Megatron-LM's pretrain_gpt.py the plug-in's arguments, attention and masks.

    The version is recognised; one without a patch is refused. A second --apply or --revert changes nothing.
    patches/README.md says what is changed, and examples/pretrain_gpt_lcab.py does the same without a patch.

    Exit status 0; with --check, 1 where the patch is not applied. 2 for bad input, and for a file that is
    neither as released nor patched.
    """
    from lcab_plugin import patching

    if check + apply + revert > 1:
        raise LcabError("--check, --apply and --revert are three things to do; give one of them.")
    version, found = patching.find(target)
    if apply or revert:
        changed = found.apply(target, revert)
        done = "reverted" if revert else "applied"
        already = "not applied" if revert else "applied already"
        typer.echo(f"Megatron-LM {version}: {found.folder} {f'is {done}' if changed else f'was {already}'}.")
        return
    state = found.state(target)
    typer.echo(f"Megatron-LM {version}: {found.folder} is {state.value}.")
    if state is patching.State.CHANGED:
        raise typer.Exit(2)
    raise typer.Exit(0 if state is patching.State.APPLIED else 1)
