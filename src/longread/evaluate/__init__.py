"""How well a model reads: loss by position and by context length, learning against frozen, with intervals."""

from longread.evaluate.estimate import Estimate, ratio
from longread.evaluate.measure import Document, InnerSteps, Measurement, check_vocabulary, measure
from longread.evaluate.plots import save_plots
from longread.evaluate.positions import PositionLoss, bin_edges
from longread.evaluate.report import html_report
from longread.evaluate.summary import Evaluation, Result, default_lengths, summarize
from longread.evaluate.table import print_tables

__all__ = [
    "Document",
    "Estimate",
    "Evaluation",
    "InnerSteps",
    "Measurement",
    "PositionLoss",
    "Result",
    "bin_edges",
    "check_vocabulary",
    "default_lengths",
    "html_report",
    "measure",
    "print_tables",
    "ratio",
    "save_plots",
    "summarize",
]
