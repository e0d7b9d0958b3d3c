"""Loss by context length, and by token index in the longest: the paper's Figure 1 (left) and Figure 6, in small."""

from __future__ import annotations

import statistics

from experiments.figures import Line, Panel, plot
from experiments.page import Page, number
from experiments.pages import KINDS, NAMES, TITLES, job, unit_of
from experiments.pages.seeds import LENGTHS, SEEDS, BySeed, by_seed, line, mean_line, minus, named, spread, whole
from experiments.plan import METHODS, UNIT
from experiments.results import Results

NEEDS = ("e2e-s0-32", "swa-s0-32", "full-s0-32")
TICKS = [L * UNIT for L in LENGTHS]
LONGER = {"SWA, 54 % more tokens": "swa-longer", "first-order, 35 % more tokens": "meta-first-order-longer"}
"""As many operations as TTT-E2E takes at 1K."""
HEAD = ["", *(f"{L}K" for L in LENGTHS)]
READINGS = {
    "TTT-E2E": ("e2e", None),
    "TTT-E2E, frozen": ("e2e", "frozen"),
    "full attention": ("full", None),
    "SWA": ("swa", None),
}


def make(found: Results) -> Page:
    page = Page(
        "context-length",
        "Loss by context length and by token index",
        "Does TTT-E2E use a longer context as full attention does, and the others not?",
    )
    absolute, relative, by_index = [], [], []
    for kind in KINDS:
        losses = {method: rows for method in METHODS if (rows := by_seed(found, method, kind))}
        longer = {name: by_seed(found, method, kind) for name, method in LONGER.items()}
        page.results |= {f"loss, {kind}": losses} | {f"loss, {kind}, {name}": rows for name, rows in longer.items()}
        tables(page, kind, losses, longer)
        absolute.append(absolute_panel(kind, losses))
        relative.append(relative_panel(kind, losses, longer))
        by_index.append(index_panel(found, page, kind))
    forgotten(found, page)
    page.plot("context", "Loss minus SWA's by context length", plot(*relative, width=11, height=4.6, labels=0.55))
    page.plot("loss", "Loss by context length", plot(*absolute))
    page.plot("index", "Loss minus SWA's by token index in stretches of 32K", plot(*by_index))
    page.results["same job twice"] = {
        f"{name}, {what}": values for (name, what), values in sorted(found.repeats.items()) if name[:3] != "box"
    }
    return page


def tables(page: Page, kind: str, losses: dict[str, BySeed], longer: dict[str, BySeed]) -> None:
    means = {NAMES[method]: whole(rows) for method, rows in losses.items()}
    means |= {name: whole(rows) for name, rows in longer.items() if rows}
    page.table(
        f"{kind.capitalize()}, mean over the seeds that reach the longest context:",
        ["", "seeds", *HEAD[1:]],
        [
            [name, ", ".join(map(str, seeds))]
            + [number(statistics.mean(columns[L]) if L in columns else None) for L in LENGTHS]
            for name, (seeds, columns) in means.items()
        ],
    )
    pairs = [("e2e", m) for m in losses if m != "e2e"] + [("full", "swa")]
    page.table(
        f"{kind.capitalize()}, differences at equal seeds: mean (range; number of seeds):",
        HEAD,
        [
            [f"{NAMES[a]} − {NAMES[b]}", *(spread(minus(losses[a], losses[b]), L) for L in LENGTHS)]
            for a, b in pairs
            if a in losses and b in losses
        ],
    )
    page.table(
        f"{kind.capitalize()}, every run:",
        HEAD,
        [
            [f"{NAMES[m]}, seed {seed}", *(number(row.get(L)) for L in LENGTHS)]
            for m, rows in losses.items()
            for seed, row in rows.items()
        ],
    )


def forgotten(found: Results, page: Page) -> None:
    """Whether an extension has lost what the model that it started from could do."""
    rows = []
    for method in METHODS:
        cells = []
        for kind in KINDS:
            change: BySeed = {}
            for seed in SEEDS:
                base, extension, what = job(method, seed, 1), job(method, seed, 32), f"{kind}-1"
                before, after = found.loss_before(base, extension, what), found.loss(extension, what)
                if before is not None and after is not None:
                    change[seed] = {1: after - before}
            page.results[f"loss at 1K after minus before the extension, {NAMES[method]}, {kind}"] = change
            cells.append(spread(change, 1))
        if any(cells):
            rows.append([NAMES[method], *cells])
    page.table(
        "Extended to 32K and read at 1K, minus before the extension: mean (range; number of seeds):", ["", *KINDS], rows
    )


def absolute_panel(kind: str, losses: dict[str, BySeed]) -> Panel:
    """TTT-E2E, full attention and SWA: each seed, and the mean at the lengths that all seeds of all three have."""
    shown = {method: losses.get(method, {}) for method in ("e2e", "full", "swa")}
    common = set(LENGTHS).intersection(*(row for rows in shown.values() for row in rows.values()))
    lines = []
    for method, rows in shown.items():
        lines += [Line(NAMES[method], [(L * UNIT, y) for L, y in row.items()], faint=True) for row in rows.values()]
        mean = line(NAMES[method], {seed: {L: row[L] for L in sorted(common)} for seed, row in rows.items()})
        lines.append(Line(mean.name, mean.points))
    return Panel(TITLES[kind], lines, unit_of(kind), "context length, tokens", markers=True, ticks=TICKS)


def relative_panel(kind: str, losses: dict[str, BySeed], longer: dict[str, BySeed]) -> Panel:
    """Means over seeds; the range only of TTT-E2E and full attention, because eight of them hide each other."""
    lines = []
    for name, rows in longer.items():
        mean = line(name, minus(rows, losses.get("swa", {})))
        lines.append(Line(name, mean.points))
    for method, rows in losses.items():
        if method != "swa":
            mean = line(NAMES[method], minus(rows, losses.get("swa", {})))
            lines.append(mean if method in ("e2e", "full") else Line(mean.name, mean.points))
    title = f"{TITLES[kind]}: loss minus SWA's, same seed"
    return Panel(title, lines, unit_of(kind), "context length, tokens", markers=True, zero="SWA", ticks=TICKS)


def index_panel(found: Results, page: Page, kind: str) -> Panel:
    """Loss minus SWA's of the same seed, mean over the seeds of which every reading is there."""
    what = f"{kind}-32"
    seeds = [s for s in SEEDS if all(found.bins(job(m, s, 32), what, reading) for m, reading in READINGS.values())]
    lines, rows = [], []
    for name, (method, reading) in READINGS.items():
        curves, bins = [], []
        for seed in seeds:
            swa = dict(found.curve(job("swa", seed, 32), what))
            curve = found.curve(job(method, seed, 32), what, reading)
            curves.append([(x, y - swa[x]) for x, y in curve if x >= 128])
            bins.append(found.bins(job(method, seed, 32), what, reading))
            page.results[f"by index, {kind}, {name}, seed {seed}"] = bins[-1]
        if bins:
            rows.append([name, *(number(statistics.mean(b[position] for b in bins)) for position in bins[0])])
        if method != "swa":
            lines.append(mean_line(name, curves))
    head = ["", *found.bins(job("swa", seeds[0], 32), what)] if seeds else []
    page.table(f"{kind.capitalize()}, by token index in stretches of 32K, mean of {named(seeds)}:", head, rows)
    title = f"{TITLES[kind]}: loss minus SWA's, same seed"
    ticks = [128, 512, 2048, 8192, 32768]
    return Panel(title, lines, unit_of(kind), "token index", zero="SWA", ticks=ticks)
