"""Scaling studies: a file that expands into cells, launchers that run them, and what is kept of each."""
