"""From the records of a folder to one page that shows them, and back: a record's command, run again."""

from lcab_plugin.report.page import Written, write
from lcab_plugin.report.sources import Source, load

__all__ = ["Source", "Written", "load", "write"]
