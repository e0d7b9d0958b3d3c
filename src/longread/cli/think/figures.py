"""The figures of a thinking agent as tables, a chart, and sentences."""

from __future__ import annotations

from longread.evaluate import Chart, Figures, Grid, Line
from longread.thinking import Report
from longread.thinking.conditions import AT_ONCE, MODEL, SIMULATOR

CHART = "trials"


def figures_of_report(report: Report) -> Figures:
    """Success under every condition, and by the number of mental trials."""
    found = report.of_withheld
    conditions = Grid(
        f"Success of one real trial, {found.boards} boards of {report.withheld} × {found.tries} tries, "
        f"K = {found.trials}",
        "condition",
        ["success", "real drops"],
        [("a plan at random", [f"{found.chance:.3f}", "–"])]
        + [(name, [f"{float(rate):.3f}", f"{found.drops[name]:,}"]) for name, rate in found.success.items()],
    )
    names = [name for name in (AT_ONCE, MODEL, SIMULATOR) if name in found.success]
    rows = []
    for families, other in report.evaluations.items():
        cells = [f"{float(other.success[name]):.3f}" for name in names]
        cells += [f"{float(other.quality.recall):.3f}", f"{float(other.quality.precision):.3f}"]
        rows.append((f"{families}, {'withheld' if families == report.withheld else 'seen'}", cells))
    combinations = Grid(
        "By combination; recall and precision: of winning plans, by the world model",
        "families",
        [*names, "recall", "precision"],
        rows,
    )
    charts = []
    if found.by_trials is not None:
        points = [(float(k), rate) for k, rate in enumerate(found.by_trials[0].tolist())]
        line = Line(f"{report.withheld}, withheld", points)
        charts = [Chart(CHART, "Success by mental trials", "mental trials", "success", [line], log_x=False)]
    return Figures([conditions, combinations], charts, report.reasons())
