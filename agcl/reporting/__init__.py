"""A finished (or running) run as one self-contained HTML page."""

from agcl.reporting.page import write_report, write_score_matrix

__all__ = ["write_report", "write_score_matrix"]
