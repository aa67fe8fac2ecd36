"""Attribution results as one self-contained HTML file: images inside, no scripts, nothing fetched."""

from .page import Attribution, Report, ReportError, Timing, render, write
from .ranking import strongest

__all__ = ["Attribution", "Report", "ReportError", "Timing", "render", "strongest", "write"]
