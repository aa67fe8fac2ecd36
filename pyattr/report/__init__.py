"""Attribution results as one self-contained HTML file: images inside, no scripts, nothing fetched."""

from .page import Attribution, Report, ReportError, Timing, render, require, write
from .ranking import shown_count, strongest

__all__ = ["Attribution", "Report", "ReportError", "Timing", "render", "require", "shown_count", "strongest", "write"]
