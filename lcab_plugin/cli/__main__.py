"""`python -m lcab_plugin.cli`: the `lcab` command where its script is not on the PATH."""

from lcab_plugin.cli import main

main()
