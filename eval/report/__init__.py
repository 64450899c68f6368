"""The HTML report: one self-contained page that needs no network and no script."""

from sparse_forcing.eval.report.page import write_report

__all__ = ["write_report"]
