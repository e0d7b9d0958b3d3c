"""How well a model reads: loss by position and context length, needles, decoding quality, health of the inner loop.

measure.py, summary.py, loss_figures.py     loss by position and by context length, learning against frozen
health.py, health_figures.py                gradient norms, clipping and drift by position; divergence
haystack.py, needle.py                      S-NIAH-1 to 3
prose_facts.py, source_facts.py             what a text tells
questions.py                                questions with answers to choose from
answering.py                                answers to them after reading
judges.py, decoding.py                      what a model writes, scored by another
continuation.py                             many texts continued side by side

Whatever measures leaves tables and charts as data, and there is one way from these to each place:
figures.py → table.py                       tables in a terminal
figures.py → drawing.py → svg.py, plots.py  charts laid out once, written as SVG or PNG
figures.py → report.py                      the page, with both
"""

from longread.evaluate.answering import (
    AnswerSheet,
    AnswerTrial,
    AskedText,
    QuestionAnswering,
    answer_figures,
    answer_questions,
)
from longread.evaluate.continuation import BatchContinuation, continue_texts
from longread.evaluate.decoding import (
    HUMAN,
    DecodingQuality,
    JudgeVerdict,
    WrittenTexts,
    check_bins,
    check_judge,
    decoding_figures,
    decoding_notes,
    prompts,
    verdicts,
    write,
)
from longread.evaluate.drawing import draw, short
from longread.evaluate.estimate import Estimate, mcnemar, ratio, wilson
from longread.evaluate.figures import Chart, Figures, Grid, Line
from longread.evaluate.haystack import VARIANTS, Haystack, Sample, Variant, check_context, essays, make_samples, noise
from longread.evaluate.health import Divergence, Health, InnerSteps, settle
from longread.evaluate.health_figures import health_figures
from longread.evaluate.judges import HuggingFaceJudge, Judge, LongreadJudge, is_hugging_face
from longread.evaluate.loss_figures import evaluation_charts, html_report, print_tables
from longread.evaluate.measure import Document, Measurement, check_vocabulary, in_common, measure
from longread.evaluate.needle import Accuracy, Needles, NeedleTrial, Search, accuracies, needle_figures, search
from longread.evaluate.plots import check_plots_can_be_drawn, save_charts
from longread.evaluate.positions import BytePositionLoss, PositionLoss, bin_edges
from longread.evaluate.questions import Candidate, Question, make_questions
from longread.evaluate.report import figures_page, html_page
from longread.evaluate.summary import Evaluation, Result, default_lengths, summarize
from longread.evaluate.svg import to_svg
from longread.evaluate.table import markdown_table, print_figures

__all__ = [
    "HUMAN",
    "VARIANTS",
    "Accuracy",
    "AnswerSheet",
    "AnswerTrial",
    "AskedText",
    "BatchContinuation",
    "BytePositionLoss",
    "Candidate",
    "Chart",
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
    "JudgeVerdict",
    "Line",
    "LongreadJudge",
    "Measurement",
    "NeedleTrial",
    "Needles",
    "PositionLoss",
    "Question",
    "QuestionAnswering",
    "Result",
    "Sample",
    "Search",
    "Variant",
    "WrittenTexts",
    "accuracies",
    "answer_figures",
    "answer_questions",
    "bin_edges",
    "check_bins",
    "check_context",
    "check_judge",
    "check_plots_can_be_drawn",
    "check_vocabulary",
    "continue_texts",
    "decoding_figures",
    "decoding_notes",
    "default_lengths",
    "draw",
    "essays",
    "evaluation_charts",
    "figures_page",
    "health_figures",
    "html_page",
    "html_report",
    "in_common",
    "is_hugging_face",
    "make_questions",
    "make_samples",
    "markdown_table",
    "mcnemar",
    "measure",
    "needle_figures",
    "noise",
    "print_figures",
    "print_tables",
    "prompts",
    "ratio",
    "save_charts",
    "search",
    "settle",
    "short",
    "summarize",
    "to_svg",
    "verdicts",
    "wilson",
    "write",
]
