"""How well a model reads: loss by position and context length, needles, decoding quality, health of the inner loop.

measure.py, summary.py, table.py, report.py    loss by position and by context length, learning against frozen
health.py, health_figures.py                   gradient norms, clipping and drift by position; divergence
haystack.py, needle.py                         S-NIAH-1 to 3
judges.py, decoding.py                         what a model writes, scored by another
continuation.py                                many texts continued side by side
figures.py, plots.py, chart.py                 tables and charts: terminal, PNG, HTML
"""

from longread.evaluate.continuation import GREEDY, Continuation, Sampling, continue_texts
from longread.evaluate.decoding import (
    HUMAN,
    DecodingQuality,
    Verdict,
    Writing,
    check_judge,
    decoding_figures,
    decoding_notes,
    prompts,
    verdicts,
    write,
)
from longread.evaluate.estimate import Estimate, ratio, wilson
from longread.evaluate.figures import Chart, Figures, Grid, figures_page, html_sections, print_figures
from longread.evaluate.haystack import VARIANTS, Haystack, Sample, Variant, check_context, essays, make_samples, noise
from longread.evaluate.health import Divergence, Health, InnerSteps, settle
from longread.evaluate.health_figures import health_figures
from longread.evaluate.judges import HuggingFaceJudge, Judge, LongreadJudge, is_hugging_face
from longread.evaluate.measure import Document, Measurement, check_vocabulary, in_common, measure
from longread.evaluate.needle import Accuracy, Needles, Search, Trial, accuracies, needle_figures, search
from longread.evaluate.plots import check_plots_can_be_drawn, save_charts, save_plots
from longread.evaluate.positions import BytePositionLoss, PositionLoss, bin_edges
from longread.evaluate.report import html_report
from longread.evaluate.summary import Evaluation, Result, default_lengths, summarize
from longread.evaluate.table import print_tables

__all__ = [
    "GREEDY",
    "HUMAN",
    "VARIANTS",
    "Accuracy",
    "BytePositionLoss",
    "Chart",
    "Continuation",
    "DecodingQuality",
    "Divergence",
    "Document",
    "Estimate",
    "Evaluation",
    "Figures",
    "Grid",
    "Haystack",
    "Health",
    "HuggingFaceJudge",
    "InnerSteps",
    "Judge",
    "LongreadJudge",
    "Measurement",
    "Needles",
    "PositionLoss",
    "Result",
    "Sample",
    "Sampling",
    "Search",
    "Trial",
    "Variant",
    "Verdict",
    "Writing",
    "accuracies",
    "bin_edges",
    "check_context",
    "check_judge",
    "check_plots_can_be_drawn",
    "check_vocabulary",
    "continue_texts",
    "decoding_figures",
    "decoding_notes",
    "default_lengths",
    "essays",
    "figures_page",
    "health_figures",
    "html_report",
    "html_sections",
    "in_common",
    "is_hugging_face",
    "make_samples",
    "measure",
    "needle_figures",
    "noise",
    "print_figures",
    "print_tables",
    "prompts",
    "ratio",
    "save_charts",
    "save_plots",
    "search",
    "settle",
    "summarize",
    "verdicts",
    "wilson",
    "write",
]
