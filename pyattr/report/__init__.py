"""Attribution results as one self-contained HTML file: images inside, no scripts, nothing fetched."""

from .matches import Matched
from .page import Attribution, Report, ReportError, Timing, render, require, write
from .ranking import shown_count, strongest

__all__ = [
    "Attribution",
    "Matched",
    "Report",
    "ReportError",
    "Timing",
    "render",
    "require",
    "shown_count",
    "strongest",
    "write",
]
