"""Pages from what `experiments.run` left: tables, plots and results.json of each experiment; text comes by hand.

    python -m experiments.pages results.tar.xz --date 2026-11-22 --hardware "4 NVIDIA H200"

Makes experiments/DATE_SLUG/ with README.md (tables, and the questions that the text must answer), results.json (every
figure of the tables) and PNG plots on a transparent ground, readable in light and dark. A page that is there already
keeps its README.md; give --overwrite to begin anew. Nothing is made of an experiment without results.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.plan import METHODS, UNIT

HERE = Path(__file__).resolve().parent
NAMES = {
    "e2e": "TTT-E2E",
    "swa": "SWA",
    "full": "full attention",
    "hybrid": "hybrid",
    "gdn": "Gated DeltaNet",
    "mamba2": "Mamba 2",
    "kvb": "TTT-KVB",
    "naive": "TTT-naive",
}
COLORS = {
    "e2e": "#d1495b",
    "swa": "#2e86ab",
    "full": "#7a7a7a",
    "hybrid": "#edae49",
    "gdn": "#3c9d6b",
    "mamba2": "#8f6bb3",
    "kvb": "#c97b3d",
    "naive": "#5f8f9f",
}
INK = "#808080"
Curves = dict[str, list[tuple[float, float]]]


@dataclass
class Page:
    """One experiment: its tables and plots, gathered before anything is written."""

    slug: str
    title: str
    questions: str
    parts: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    plots: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def table(self, caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        rows = [list(row) for row in rows]
        if rows:
            lines = [
                " | ".join(head),
                "|".join(["---"] + ["--:"] * (len(head) - 1)),
                *(" | ".join(row) for row in rows),
            ]
            self.parts.append(
                caption + "\n\n" + "\n".join(f"| {line} |" if i != 1 else f"|{line}|" for i, line in enumerate(lines))
            )

    def plot(self, name: str, caption: str, draw: Callable[[Path], None]) -> None:
        self.plots[name] = draw
        self.parts.append(f"![{caption}]({name}.png)")


@dataclass
class Results:
    """What the runs left, by job."""

    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)

    def load(self, archive: Path) -> None:
        with tarfile.open(archive) as tar:
            for member in tar:
                path, file = Path(member.name), tar.extractfile(member)
                if file is None or path.suffix != ".json":
                    continue
                content = json.load(file)
                if path.parts[0] == "results":
                    self.evaluations.setdefault(path.parts[1], {})[path.stem] = content
                elif path.parts[0] == "metrics":
                    self.metrics[path.stem] = content
                elif path.name == "state.json":
                    self.state = content
                elif path.name == "corpus.json":
                    self.corpus = content

    def reading(self, job: str, what: str, reading: str | None = None) -> dict[str, Any] | None:
        """One result of an evaluation: `reading` learning, frozen, static; None: static or learning."""
        found = self.evaluations.get(job, {}).get(what, {}).get("results", [])
        wanted = ("static", "learning") if reading is None else (reading,)
        return next((result for result in found if result["reading"] in wanted), None)

    def loss(self, job: str, what: str, reading: str | None = None) -> float | None:
        found = self.reading(job, what, reading)
        return None if found is None else found["loss"]["nats_per_token"]["mean"]

    def curve(self, job: str, what: str, reading: str | None = None) -> list[tuple[float, float]]:
        """(position, loss), in bins of a quarter octave."""
        found = self.reading(job, what, reading)
        rows = [] if found is None else found["curve"]
        return [(math.sqrt(max(r["start"], 8) * r["end"]), r["score"]["nats_per_token"]["mean"]) for r in rows]

    def bins(self, job: str, what: str, reading: str | None = None) -> dict[str, float]:
        """Loss by octave of positions."""
        found = self.reading(job, what, reading)
        rows = [] if found is None else found["by_position"]
        return {f"{r['start']}–{r['end']}": r["score"]["nats_per_token"]["mean"] for r in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path, help="results.tar.xz, later ones win")
    parser.add_argument("--date", required=True)
    parser.add_argument("--hardware", default="")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    found = Results()
    for archive in options.archives:
        found.load(archive)
    for make in (box, context, meta, stability, ablation, kvb, toy, needle, decoding):
        page = make(found)
        if page.parts:
            write(page, options.out / f"{options.date}_{page.slug}", found, options.hardware, options.overwrite)
    return 0


def write(page: Page, folder: Path, found: Results, hardware: str, overwrite: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in page.plots.items():
        draw(folder / f"{name}.png")
    (folder / "results.json").write_text(json.dumps(page.results, indent=1) + "\n", encoding="utf-8")
    readme = folder / "README.md"
    if overwrite or not readme.exists():
        head = f"# {page.title}\n\n{page.questions}\n\n{setting(found, hardware)}\n\n"
        readme.write_text(head + "\n\n".join(page.parts) + "\n", encoding="utf-8")
    print(folder)


def setting(found: Results, hardware: str) -> str:
    sizes, scale = found.corpus.get("bytes", {}), found.state.get("scale", 1.0)
    return (
        f"Recipe `small` with `experiments/plan.py` at scale {scale}: 7.1M parameters in every method, BPE of 4096 "
        f"tokens, trained on {sizes.get('books', 0) / 1e6:.0f} MB of books and {sizes.get('code', 0) / 1e6:.0f} MB of "
        "Python source. Losses are nats per token on held-out books, and on held-out Python source where a table says "
        f"code, each cut into stretches of the context length. {hardware}".strip()
    )


# The experiments


def box(found: Results) -> Page:
    page = Page("boxed-model", "The model in the box", "What does it gain by learning while it reads, and how far?")
    jobs = {"box-32": "TTT-E2E (boxed)", "twin-swa-32": "SWA twin", "twin-full-32": "full-attention twin"}
    for kind in ("books", "code"):
        what = f"{kind}-64"
        rows = []
        for job, name in jobs.items():
            for reading in ("learning", "frozen", "static"):
                bins = found.bins(job, what, reading)
                if bins:
                    page.results[f"{name}, {reading}, {kind}"] = bins
                    rows.append((f"{name}, {reading}" if reading != "static" else name, bins))
        if rows:
            positions = list(rows[0][1])
            page.table(
                f"{kind.capitalize()}, by position in stretches of 64K tokens:",
                ["", *positions],
                ([name, *(number(bins.get(position)) for position in positions)] for name, bins in rows),
            )
        learning, frozen = (dict(found.curve("box-32", what, reading)) for reading in ("learning", "frozen"))
        if learning:
            gain = [(x, frozen[x] - y) for x, y in learning.items() if x in frozen]
            page.results[f"gain, {kind}"] = gain
            page.plot(
                f"gain-{kind}",
                f"Gain of learning over frozen reading, {kind}",
                line_plot({"gain": gain}, "nats per token gained"),
            )
    return page


def context(found: Results) -> Page:
    page = Page(
        "context-length",
        "Loss by context length and by token index",
        "Does TTT-E2E use a longer context as full attention does, and the others not?",
    )
    lengths = (1, 2, 4, 8, 16, 32)
    for kind in ("books", "code"):
        curves: Curves = {}
        rows = []
        for method in METHODS:
            seeds = [[found.loss(job(method, seed, L), f"{kind}-{L}") for L in lengths] for seed in (0, 1, 2)]
            columns = [[loss for loss in column if loss is not None] for column in zip(*seeds, strict=True)]
            if not any(columns):
                continue
            page.results[f"{method}, {kind}"] = dict(zip(lengths, columns, strict=True))
            curves[method] = [(L * UNIT, statistics.mean(c)) for L, c in zip(lengths, columns, strict=True) if c]
            n = min((len(column) for column in columns if column), default=0)
            rows.append([f"{NAMES[method]} ({n} seed{'s' * (n > 1)})", *(spread(column) for column in columns)])
        page.table(
            f"{kind.capitalize()}, mean over seeds (range in brackets):", ["", *(f"{L}K" for L in lengths)], rows
        )
        if curves:
            page.plot(
                f"context-{kind}", f"Loss by context length, {kind}", line_plot(curves, "nats per token", markers=True)
            )
        index: Curves = {m: found.curve(job(m, 0, 32), f"{kind}-32") for m in METHODS}
        index["e2e, frozen"] = found.curve(job("e2e", 0, 32), f"{kind}-32", "frozen")
        index = {name: curve for name, curve in index.items() if curve}
        reference = dict(index.get("full", []))
        if reference:
            page.results[f"by index, {kind}"] = index
            relative = {
                name: [(x, y - reference[x]) for x, y in curve if x in reference] for name, curve in index.items()
            }
            page.plot(
                f"index-{kind}",
                f"Loss minus full attention's by token index, {kind}",
                line_plot(relative, "loss − full attention"),
            )
            bins = {name: found.bins(job(name, 0, 32), f"{kind}-32") for name in METHODS}
            bins["e2e, frozen"] = found.bins(job("e2e", 0, 32), f"{kind}-32", "frozen")
            positions = list(bins["full"])
            page.table(
                f"{kind.capitalize()}, by token index at 32K (seed 0):",
                ["", *positions],
                ([label(name), *(number(b.get(p)) for p in positions)] for name, b in bins.items() if b),
            )
    return page


def meta(found: Results) -> Page:
    page = Page(
        "meta-gradients",
        "Exact, truncated and first-order meta-gradients",
        "What does the exact gradient buy, at equal tokens and at equal time?",
    )
    jobs = {"e2e-s0": "exact", "meta-cut-4": "cut every 4 steps", "meta-cut-2": "cut every 2 steps"}
    jobs |= {"meta-first-order": "first-order", "naive-s0": "static loss (TTT-naive)", "swa-s0": "SWA, reads static"}
    rows, curves = [], {}
    for name, title in jobs.items():
        losses = [found.loss(name, "books-1"), found.loss(name, "books-1", "frozen")]
        losses += [found.loss(f"{name}-8", "books-8"), found.loss(f"{name}-8", "books-8", "frozen")]
        if any(losses):
            seconds = sum(row["tokens"] for row in found.metrics.get(name, [])[-1:]) / (
                median_speed(found, name) or math.inf
            )
            page.results[title] = {
                "books 1K, learning and frozen; 8K": losses,
                "seconds alone at its median speed": seconds,
            }
            rows.append([title, *(number(loss) for loss in losses), f"{median_speed(found, name) / 1e3:.0f}K"])
            speed = median_speed(found, name) or math.inf
            curves[title] = [(row["tokens"] / speed, row["loss"]) for row in found.metrics.get(name, [])[5:]]
    page.table("Books; seed 0:", ["", "1K", "1K frozen", "8K", "8K frozen", "tokens/s"], rows)
    if rows:
        page.plot(
            "by-time",
            "Training loss by seconds",
            line_plot(curves, "training loss", x="seconds at median speed", log=False),
        )
    return page


def stability(found: Results) -> Page:
    page = Page("stability", "What makes meta-training diverge or stall", "Which settings matter, and what failed?")
    rows = []
    for name, metrics in sorted(found.metrics.items()):
        if name.startswith("stable-"):
            status = found.state.get("jobs", {}).get(name, {}).get("status", "")
            largest = max(row["grad_norm"] for row in metrics)
            clipped = metrics[-1].get("inner_clipped", 0.0)
            learning, frozen = found.loss(name, "books-1"), found.loss(name, "books-1", "frozen")
            page.results[name[7:]] = {"status": status, "learning": learning, "frozen": frozen, "largest norm": largest}
            rows.append([name[7:], status, number(learning), number(frozen), f"{largest:.3g}", f"{clipped:.0%}"])
    page.table(
        "200 steps of 64K tokens, books:", ["", "status", "learning", "frozen", "largest gradient", "clipped"], rows
    )
    return page


def ablation(found: Results) -> Page:
    page = Page(
        "ablations", "Window, mini-batch, and how many blocks learn", "Do the paper's three ablations come out?"
    )
    rows = []
    for name in sorted(found.evaluations):
        if name.startswith("ablate-"):
            losses = [found.loss(name, f"books-{L}", reading) for L in (1, 8) for reading in (None, "frozen")]
            page.results[name[7:]] = losses
            rows.append([name[7:], *(number(loss) for loss in losses)])
    page.table(
        "Half of the tokens of the other experiments, one seed:", ["", "1K", "1K frozen", "8K", "8K frozen"], rows
    )
    return page


def kvb(found: Results) -> Page:
    page = Page("kvb-to-e2e", "From key-value binding to the end-to-end loss", "Which step of the derivation helps?")
    jobs = {"swa-s0": "SWA", "kvb-s0": "TTT-KVB", "kvb-simplified": "simplified (Eq. 9)"}
    jobs |= {"e2e-every-block": "next-token loss, every block", "e2e-s0": "TTT-E2E"}
    rows = [(title, found.loss(name, "books-1"), found.loss(name, "code-1")) for name, title in jobs.items()]
    if found.loss("kvb-s0", "books-1") is not None or found.loss("e2e-every-block", "books-1") is not None:
        page.results = {title: losses for title, *losses in rows}
        page.table("At 1K, seed 0:", ["", "books", "code"], ([t, number(a), number(b)] for t, a, b in rows if a))
    return page


def toy(found: Results) -> Page:
    page = Page(
        "figure-2-toy", "The toy of Figure 2", "Is the order that of the paper, with drops after each mini-batch?"
    )
    titles = {"full": "full attention", "none": "no attention", "naive": "TTT-naive, b=1", "e2e-16": "TTT-E2E, b=16"}
    titles |= {"e2e-1": "TTT-E2E, b=1"}
    rows, curves, head = [], {}, []
    for name, title in titles.items():
        result = found.reading(f"toy-{name}", "books-index")
        if result:
            head = [f"token {row['start'] + 1}" for row in result["at_index"]]
            page.results[title] = {
                row["start"] + 1: row["score"]["nats_per_token"]["mean"] for row in result["at_index"]
            }
            rows.append([title, *(number(loss) for loss in page.results[title].values())])
            curves[title] = found.curve(f"toy-{name}", "books-index")
    page.table("Loss at a token:", ["", *head], rows)
    if rows:
        page.plot("toy", "Loss by token index", line_plot(curves, "nats per token"))
    return page


def needle(found: Results) -> Page:
    page = Page("needles", "Needles in a haystack", "Is anything recalled beyond the window?")
    rows, head = [], []
    for name in sorted(found.evaluations):
        for result in found.evaluations[name].get("needle", {}).get("results", []):
            for variant in sorted({entry["variant"] for entry in result["accuracy"]}):
                entries = [entry for entry in result["accuracy"] if entry["variant"] == variant]
                head = [f"{entry['context_length'] // UNIT}K" for entry in entries]
                cells = [f"{mean(e['inside_window'])} / {mean(e['outside_window'])}" for e in entries]
                nats = [f"{mean(e.get('value_nats_inside'))} / {mean(e.get('value_nats_outside'))}" for e in entries]
                title = f"{result['model']}, {result['reading']}, {variant}"
                page.results[title] = {"accuracy": entries}
                rows += [[title, *cells], ["nats of the value", *nats]]
    page.table("Accuracy, needle inside / outside the window, and nats to spell the value:", ["", *head], rows)
    return page


def decoding(found: Results) -> Page:
    page = Page("decoding", "How well models continue a text", "Judged by another model's loss.")
    rows, head = [], []
    for name in sorted(found.evaluations):
        content = found.evaluations[name].get("judge", {})
        for verdict in content.get("verdicts", []):
            entries = verdict["by_position"]
            head = [f"{entry['start']}–{entry['end']}" for entry in entries]
            title = f"{verdict['writer']}, {verdict['reading']} (judge {content['judge']})"
            page.results[title] = verdict
            rows.append(
                [title, *(mean(entry["score"]["nats_per_token"]) for entry in entries), mean(verdict["repeated"])]
            )
    page.table("Nats per token by position, and the share of repeated text:", ["", *head, "repeated"], rows)
    return page


# Figures


def job(method: str, seed: int, length: int) -> str:
    return f"{method}-s{seed}" + (f"-{length}" if length > 1 else "")


def label(name: str) -> str:
    base, _, rest = name.partition(", ")
    return NAMES.get(base, base) + (f", {rest}" if rest else "")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def mean(estimate: dict[str, Any] | None) -> str:
    return "–" if not estimate else f"{estimate['mean']:.2f}"


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else "")


def median_speed(found: Results, name: str) -> float:
    speeds = [row["tokens_per_second"] for row in found.metrics.get(name, [])]
    return statistics.median(speeds) if speeds else 0.0


def line_plot(
    curves: Curves, y: str, *, x: str = "tokens", log: bool = True, markers: bool = False
) -> Callable[[Path], None]:
    """A plot of lines; names of methods decide the colours, ", frozen" the dashes."""

    def draw(path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for i, (name, curve) in enumerate(curves.items()):
            base, _, rest = name.partition(", ")
            color = COLORS.get(base, list(COLORS.values())[i % len(COLORS)])
            style = {
                "linestyle": "--" if rest == "frozen" else "-",
                "marker": "o" if markers else None,
                "markersize": 4,
            }
            axes.plot(
                [a for a, _ in curve], [b for _, b in curve], label=label(name), color=color, linewidth=1.8, **style
            )
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K" if value >= 1024 else f"{value:g}")
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)
        axes.tick_params(colors=INK, which="both")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        axes.grid(color=INK, alpha=0.2)
        axes.legend(frameon=False, labelcolor=INK)
        figure.savefig(path, transparent=True)

    return draw


if __name__ == "__main__":
    sys.exit(main())
