"""The `lcab` command."""

from __future__ import annotations

import sys

from lcab_plugin.errors import LcabError


def main() -> None:
    """Run the command; an LcabError becomes one sentence on stderr and exit status 2."""
    from lcab_plugin.cli.app import app

    try:
        app()
    except LcabError as error:
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(
            f"error: {error}", style="red", markup=False, highlight=False
        )
        sys.exit(2)
