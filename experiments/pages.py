"""Pages from what `experiments.run` left: tables, plots and results.json of each experiment; text comes by hand.

    python -m experiments.pages first.tar.xz second.tar.xz --date 2026-11-22

Makes experiments/DATE_SLUG/ with README.md (tables, and the questions that the text must answer), results.json (every
figure of the tables) and PNG plots on a transparent ground, readable in light and dark. A page that is there already
keeps its README.md; give --overwrite to begin anew. Nothing is made of an experiment without results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.figures import Line, Panel, plot
from experiments.page import Page, interval, mean, number, paired
from experiments.plan import METHODS, STABILITY, UNIT, ablations
from experiments.results import Curve, Results

HERE = Path(__file__).resolve().parent
NAMES = {
    "e2e": "TTT-E2E",
    "swa": "SWA",
    "full": "full attention",
    "hybrid": "hybrid 5 : 1",
    "gdn": "Gated DeltaNet",
    "mamba2": "Mamba 2",
    "kvb": "TTT-KVB",
    "naive": "TTT-naive",
}
SEEDS = (0, 1, 2)
LENGTHS = (1, 2, 4, 8, 16, 32)
KINDS = ("books", "code")
MORE = "full-s1-32-more"
"""Full attention with four times the steps of extension, as a job and as a row of tables."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path, help="results.tar.xz, later ones win")
    parser.add_argument("--date", required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    found = Results()
    for archive in options.archives:
        found.load(archive)
    for make, needs in PAGES.items():
        page = make(found) if all(name in found.evaluations for name in needs) else None
        if page is not None and page.parts:
            folder = options.out / f"{options.date}_{page.slug}"
            page.write(folder, options.overwrite)
            print(folder)
    return 0


# The experiments


def box(found: Results) -> Page:
    page = Page("boxed-model", "The model in the box", "What does it gain by learning while it reads, and how far?")
    jobs = {"box-32": "TTT-E2E (boxed)", "twin-swa-32": "SWA twin", "twin-full-32": "full-attention twin"}
    lines = []
    for kind in KINDS:
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
        read = found.reading("box-32", what, "learning")
        if read:
            page.results[f"gain by context length, {kind}"] = {
                row["context_length"]: row["gain_over_frozen"] for row in read["by_context_length"]
            }
            page.results[f"health, {kind}"] = {key: read["health"][key] for key in HEALTH}
            frozen = dict(found.curve("box-32", what, "frozen"))
            gain = [(x, frozen[x] - y) for x, y in found.curve("box-32", what, "learning") if x >= 64]
            lines.append(Line(TITLES[kind], gain))
    if lines:
        panel = Panel(
            "What learning while reading adds", lines, "nats per token gained over frozen", "token index",
            zero="frozen", ticks=[64, 256, 1024, 4096, 16384, 65536],
        )  # fmt: skip
        page.plot("gain", "Gain of learning over frozen reading by token index", plot(panel, width=7, labels=0.16))
    return page


HEALTH = ("steps", "mean_gradient_norm", "largest_gradient_norm", "clipped_share", "drift")


def context(found: Results) -> Page:
    page = Page(
        "context-length",
        "Loss by context length and by token index",
        "Does TTT-E2E use a longer context as full attention does, and the others not?",
    )
    absolute, relative, by_index = [], [], []
    for kind in KINDS:
        losses = {
            method: {seed: {L: found.loss(job(method, seed, L), f"{kind}-{L}") for L in LENGTHS} for seed in SEEDS}
            for method in METHODS
        }
        losses = {m: {s: row for s, row in seeds.items() if any(row.values())} for m, seeds in losses.items()}
        losses = {method: seeds for method, seeds in losses.items() if seeds}
        more = {1: {L: found.loss(MORE, f"{kind}-{L}") for L in (1, 32)}}
        page.results[f"loss, {kind}"] = losses | {MORE: more}
        rows = [
            [f"{NAMES[m]}, seed {seed}", *(number(row[L]) for L in LENGTHS)]
            for m, seeds in losses.items()
            for seed, row in seeds.items()
        ]
        rows.append(["full attention, seed 1, 200 steps of extension", *[""] * 5, number(more[1][32])])
        page.table(f"{kind.capitalize()}:", ["", *(f"{L}K" for L in LENGTHS)], rows)
        differences = [
            [f"{NAMES[a]} − {NAMES[b]}", *(paired(losses[a], losses[b], L)[1] for L in LENGTHS)]
            for a, b in (("e2e", "swa"), ("e2e", "full"), ("full", "swa"))
        ]
        page.table(
            f"{kind.capitalize()}, differences at equal seeds: mean (range; number of seeds):",
            ["", *(f"{L}K" for L in LENGTHS)],
            differences,
        )
        absolute.append(absolute_panel(kind, losses, more[1][32]))
        relative.append(relative_panel(kind, losses, more[1][32]))
        by_index.append(index_panel(found, page, kind))
    page.plot("context", "Loss minus SWA's by context length", plot(*relative))
    page.plot("loss", "Loss by context length", plot(*absolute))
    page.plot("index", "Loss minus SWA's by token index in stretches of 32K", plot(*by_index))
    page.results["same job twice"] = {
        f"{name}, {what}": values for (name, what), values in sorted(found.repeats.items()) if name[:3] != "box"
    }
    return page


def absolute_panel(kind: str, losses: dict[str, Any], more: float | None) -> Panel:
    """TTT-E2E, full attention and SWA: each seed, and the mean at the lengths that all its seeds have."""
    lines = []
    for method in ("e2e", "full", "swa"):
        for row in losses[method].values():
            points = [(L * UNIT, row[L]) for L in LENGTHS if row[L] is not None]
            lines.append(Line(NAMES[method], points, faint=True))
        columns = {L: [row[L] for row in losses[method].values()] for L in LENGTHS}
        points = [(L * UNIT, statistics.mean(c)) for L, c in columns.items() if None not in c]
        lines.append(Line(NAMES[method], points))
    if more is not None:
        lines.append(Line("full, 200 steps", [(32 * UNIT, more)]))
    return Panel(TITLES[kind], lines, y_of(kind), "context length, tokens", markers=True, ticks=TICKS)


def relative_panel(kind: str, losses: dict[str, Any], more: float | None) -> Panel:
    lines = []
    for method in METHODS:
        values = {L: paired(losses.get(method, {}), losses["swa"], L)[0] for L in LENGTHS}
        values = {L: v for L, v in values.items() if v}
        if values and method != "swa":
            points = [(L * UNIT, statistics.mean(v)) for L, v in values.items()]
            several = max(map(len, values.values())) > 1
            low, high = ([pick(v) for v in values.values()] if several else [] for pick in (min, max))
            lines.append(Line(NAMES[method], points, low, high))
    if more is not None:
        lines.append(Line("full, 200 steps", [(32 * UNIT, more - losses["swa"][1][32])]))
    title = f"{TITLES[kind]}: loss minus SWA's, same seed"
    return Panel(title, lines, y_of(kind), "context length, tokens", markers=True, zero="SWA", ticks=TICKS)


def y_of(kind: str) -> str:
    """Of two panels side by side, the left one names the unit."""
    return "nats per token" if kind == "books" else ""


TICKS = [L * UNIT for L in LENGTHS]
TITLES = {"books": "Held-out books", "code": "Held-out Python"}


def index_panel(found: Results, page: Page, kind: str) -> Panel:
    """Loss minus SWA's of the same seed, mean over seeds 1 and 2, in which the frozen control was read too."""
    readings = {"TTT-E2E": ("e2e", None), "TTT-E2E, frozen": ("e2e", "frozen"), "full attention": ("full", None)}
    readings["SWA"] = ("swa", None)
    lines, rows = [], []
    for name, (method, reading) in readings.items():
        curves, bins = [], []
        for seed in (1, 2):
            swa = dict(found.curve(job("swa", seed, 32), f"{kind}-32"))
            curve = found.curve(job(method, seed, 32), f"{kind}-32", reading)
            curves.append([(x, y - swa[x]) for x, y in curve if x >= 128])
            bins.append(found.bins(job(method, seed, 32), f"{kind}-32", reading))
        page.results[f"by index, {kind}, {name}, seeds 1 and 2"] = bins
        rows.append([name, *(number(statistics.mean(b[p] for b in bins)) for p in bins[0])])
        if method != "swa":
            lines.append(mean_line(name, curves))
    more = found.bins(MORE, f"{kind}-32")
    if more:
        page.results[f"by index, {kind}, {MORE}"] = more
        rows.append(["full attention, 200 steps of extension, seed 1", *(number(more[p]) for p in bins[0])])
        swa = dict(found.curve("swa-s1-32", f"{kind}-32"))
        points = [(x, y - swa[x]) for x, y in found.curve(MORE, f"{kind}-32") if x >= 128]
        lines.append(Line("full, 200 steps", points))
    page.table(f"{kind.capitalize()}, by token index in stretches of 32K, mean of seeds 1 and 2:", ["", *bins[0]], rows)
    title = f"{TITLES[kind]}: loss minus SWA's, same seed"
    ticks = [128, 512, 2048, 8192, 32768]
    return Panel(title, lines, y_of(kind), "token index", zero="SWA", ticks=ticks)


def mean_line(name: str, curves: list[Curve]) -> Line:
    columns = list(zip(*curves, strict=True))
    ys = [[y for _, y in column] for column in columns]
    points = [(column[0][0], statistics.mean(y)) for column, y in zip(columns, ys, strict=True)]
    return Line(name, points, list(map(min, ys)), list(map(max, ys)))


def meta(found: Results) -> Page:
    page = Page(
        "meta-gradients",
        "Exact, truncated and first-order meta-gradients",
        "What does the exact gradient buy, at equal tokens and at equal time?",
    )
    jobs = {"e2e-s0": "exact", "meta-cut-4": "cut every 4 steps", "meta-cut-2": "cut every 2 steps"}
    jobs |= {"meta-first-order": "first-order", "naive-s0": "static loss (TTT-naive)", "swa-s0": "SWA"}
    rows, lines = [], []
    for name, title in jobs.items():
        cells = []
        for kind in KINDS:
            for length in (1, 8):
                this = name if length == 1 else f"{name}-8"
                learning, frozen = (found.loss(this, f"{kind}-{length}", reading) for reading in (None, "frozen"))
                page.results[f"{title}, {kind} {length}K"] = {"learning or static": learning, "frozen": frozen}
                cells.append(number(learning) + (f" / {number(frozen)}" if frozen else ""))
        if any(cells):
            rows.append([title, *cells])
        if title != "exact":
            lines.append(Line(title, lag(found.training(name), found.training("e2e-s0"))))
    page.results["training loss minus exact's, by million tokens"] = {line.name: line.points[::4] for line in lines}
    page.results["same job twice"] = {
        f"{name}, {what}": values for (name, what), values in found.repeats.items() if name in jobs
    }
    page.table("Seed 0, learning / frozen:", ["", "books 1K", "books 8K", "code 1K", "code 8K"], rows)
    late = [Line(line.name, [(x, y) for x, y in line.points if x >= 25]) for line in lines]
    panels = [
        Panel("Training loss minus that of exact meta-gradients", lines[1:], "nats per token", "million tokens",
              log=False, zero="exact", limits=(-0.03, 0.7), ticks=[0, 20, 40, 60]),
        Panel("From 25 million tokens on", late, "", "million tokens", log=False, zero="exact",
              limits=(-0.01, 0.2), ticks=[30, 40, 50, 60]),
    ]  # fmt: skip
    page.plot("training", "Training loss minus that of exact meta-gradients", plot(*panels, labels=0.45))
    return page


def lag(curve: Curve, reference: Curve, window: float = 3.3e6) -> Curve:
    """(million tokens, how far the running mean of a training loss lies above that of another run)."""

    def running(points: Curve, end: float) -> float:
        return statistics.mean(y for x, y in points if end - window < x <= end)

    ends = [x for x, _ in reference if x >= window and curve and x <= curve[-1][0]]
    return [(x / 1e6, running(curve, x) - running(reference, x)) for x in ends]


def smooth(line: Line, width: int = 9) -> Line:
    """A running mean."""
    points = [line.points[max(0, i - width) : i + 1] for i in range(len(line.points))]
    return Line(line.name, [(p[-1][0], statistics.mean(y for _, y in p)) for p in points])


def stability(found: Results) -> Page:
    page = Page("stability", "What makes meta-training diverge or stall", "Which settings matter, and what failed?")
    rows, lines = [], []
    for name in STABILITY:
        metrics = found.metrics.get(f"stable-{name}", [])
        if metrics:
            learning, frozen = (found.loss(f"stable-{name}", "books-1", reading) for reading in (None, "frozen"))
            largest = max(row["grad_norm"] for row in metrics)
            inner, clipped = metrics[-1]["inner_grad_norm"], metrics[-1]["inner_clipped"]
            page.results[name] = {
                "learning": learning,
                "frozen": frozen,
                "largest outer gradient norm": largest,
                "inner gradient norm at the end": inner,
                "share of clipped inner steps at the end": clipped,
                "training loss by tokens": found.training(f"stable-{name}")[::5],
            }
            rows.append([name, number(learning), number(frozen), f"{largest:.2f}", f"{inner:.2f}", f"{clipped:.0%}"])
            points = [(x / 1e6, y) for x, y in found.training(f"stable-{name}") if x > 1.5e6]
            lines.append(smooth(Line(name, points), 3))
    head = ["", "learning", "frozen", "largest outer norm", "inner norm, end", "clipped, end"]
    page.table("200 steps of 64K tokens, books at 1K, seed 0:", head, rows)
    panel = Panel(
        "Training loss", lines, "nats per token", "million tokens", log=False, limits=(4.2, 6.5), ticks=range(2, 14, 2)
    )
    page.plot("training", "Training loss of 200 steps", plot(panel, width=7.5, labels=0.3))
    return page


def ablation(found: Results) -> Page:
    page = Page(
        "ablations", "Window, mini-batch, and how many blocks learn", "Do the paper's three ablations come out?"
    )

    def losses(name: str, length: int = 1) -> dict[str, float | None]:
        job, what = f"ablate-{name}" + ("-8" if length == 8 else ""), f"books-{length}"
        return {"learning or static": found.loss(job, what), "frozen": found.loss(job, what, "frozen")}

    windows = {128: "window-1-8", 256: "window-1-4", 512: "window-1-2", 1024: "e2e"}
    static = {128: "swa-window-1-8", 256: "swa-window-1-4", 512: "swa-window-1-2", 1024: "swa"}
    batches = {64: "mini-batch-1-16", 128: "e2e", 256: "mini-batch-1-4", 512: "mini-batch-1-2", 1024: "mini-batch-1-1"}
    blocks = {1: "suffix-1", 2: "e2e", 4: "suffix-4"}
    for title, names in (("window", windows), ("SWA, window", static), ("mini-batch", batches), ("blocks", blocks)):
        page.results |= {f"{title} {size}": losses(name) for size, name in names.items()}
    page.results |= {f"blocks {size}, 8K": losses(name, 8) for size, name in blocks.items()}
    page.results["full attention"] = losses("full")
    read = "learning or static"
    page.table(
        "Window:",
        ["", *map(str, windows)],
        [
            ["TTT-E2E", *(number(page.results[f"window {w}"][read]) for w in windows)],
            ["TTT-E2E, frozen", *(number(page.results[f"window {w}"]["frozen"]) for w in windows)],
            ["SWA", *(number(page.results[f"SWA, window {w}"][read]) for w in windows)],
        ],
    )
    page.table(
        "Mini-batch:",
        ["", *map(str, batches)],
        [
            ["learning", *(number(page.results[f"mini-batch {b}"][read]) for b in batches)],
            ["frozen", *(number(page.results[f"mini-batch {b}"]["frozen"]) for b in batches)],
        ],
    )
    page.table(
        "Blocks that learn, of 8:",
        ["", *map(str, blocks)],
        [
            [f"{length}, {name}", *(number(page.results[f"blocks {b}{suffix}"][key]) for b in blocks)]
            for length, suffix in (("1K", ""), ("8K", ", 8K"))
            for name, key in (("learning", read), ("frozen", "frozen"))
        ],
    )

    def line(name: str, prefix: str, sizes: Iterable[int], key: str = read, suffix: str = "") -> Line:
        return Line(name, [(size, page.results[f"{prefix} {size}{suffix}"][key]) for size in sizes])

    panels = [
        Panel("Window", [line("TTT-E2E", "window", windows), line("TTT-E2E, frozen", "window", windows, "frozen"),
              line("SWA", "SWA, window", windows)], "nats per token, books", ticks=list(windows), markers=True),
        Panel("Mini-batch", [line("TTT-E2E", "mini-batch", batches),
              line("TTT-E2E, frozen", "mini-batch", batches, "frozen")], ticks=list(batches), markers=True),
        Panel("Blocks that learn", [line("TTT-E2E, 1K", "blocks", blocks),
              line("TTT-E2E, 8K", "blocks", blocks, suffix=", 8K")], x="of 8", ticks=list(blocks), markers=True),
    ]  # fmt: skip
    page.plot("ablations", "Three ablations", plot(*panels, width=10.5, height=3.6, labels=0.55))
    return page


def kvb(found: Results) -> Page:
    page = Page("kvb-to-e2e", "From key-value binding to the end-to-end loss", "Which step of the derivation helps?")
    jobs = {"swa-s0": "SWA", "kvb-s0": "TTT-KVB", "kvb-simplified": "simplified (Eq. 9)"}
    jobs |= {"e2e-every-block": "next-token loss, every block", "e2e-s0": "TTT-E2E"}
    reached = found.metrics["kvb-simplified"][-1]["tokens"] if "kvb-simplified" in found.metrics else 0
    rows = []
    for name, title in jobs.items():
        training = [y for x, y in found.training(name) if 0.9 * reached <= x <= reached]
        values = [found.loss(name, "books-1"), found.loss(name, "code-1")]
        values.append(statistics.mean(training) if training else None)
        if any(values):
            page.results[title] = dict(zip(("books 1K", "code 1K", "training loss there"), values, strict=True))
            rows.append([title, *map(number, values)])
    page.results["tokens where the training losses are compared"] = reached
    head = ["", "books 1K", "code 1K", f"training loss at {0.9 * reached / 1e6:.1f}M to {reached / 1e6:.1f}M tokens"]
    page.table("Seed 0:", head, rows)
    return page


def toy(found: Results) -> Page:
    page = Page(
        "figure-2-toy", "The toy of Figure 2", "Is the order that of the paper, with drops after each mini-batch?"
    )
    titles = {"full": "full attention", "none": "SWA, window of one token", "naive": "TTT-naive, b = 1"}
    titles["e2e-16"] = "TTT-E2E, b = 16"
    rows, lines, head = [], [], []
    for name, title in titles.items():
        result = found.reading(f"toy-{name}", "books-index")
        for reading in ("static", "learning", "frozen"):
            result = found.reading(f"toy-{name}", "books-index", reading)
            if result:
                head = [f"token {row['start'] + 1}" for row in result["at_index"]]
                this = title + (", frozen" if reading == "frozen" else "")
                at = {row["start"] + 1: row["score"]["nats_per_token"]["mean"] for row in result["at_index"]}
                curve = {f"{r['start']}–{r['end']}": r["score"]["nats_per_token"]["mean"] for r in result["curve"]}
                page.results[this] = {"at": at, "curve": curve}
                rows.append([this, *(number(loss) for loss in at.values()), number(curve_mean(result["curve"][8:]))])
    page.table("Loss at a token, and the mean over tokens 23 to 128:", ["", *head, "23–128"], rows)
    none = dict(found.curve("toy-none", "books-index"))
    for name, title in titles.items():
        if name != "none":
            points = [(x, y - none[x]) for x, y in found.curve(f"toy-{name}", "books-index") if x > 3]
            lines.append(Line(title, points))
    panel = Panel(
        "Loss minus that of the model without attention", lines, "nats per token", "token index", zero="no attention",
        ticks=[4, 8, 16, 32, 64, 128],
    )  # fmt: skip
    page.plot("toy", "Loss minus that without attention, by token index", plot(panel, width=7.5, labels=0.3))
    partial = found.metrics.get("toy-e2e-1", [])
    if partial:
        until = partial[-1]["tokens"]
        page.results["training loss up to where toy-e2e-1 was stopped"] = {
            name: [y for x, y in found.training(f"toy-{name}") if 0.9 * until <= x <= until]
            for name in ("full", "none", "naive", "e2e-16", "e2e-1")
        }
    return page


def curve_mean(rows: Sequence[dict[str, Any]]) -> float:
    total = sum(r["end"] - r["start"] for r in rows)
    return float(sum((r["end"] - r["start"]) * r["score"]["nats_per_token"]["mean"] for r in rows) / total)


def needle(found: Results) -> Page:
    page = Page("needles", "Needles in a haystack", "Is anything recalled beyond the window?")
    rows, head = [], []
    for name in sorted(found.evaluations):
        for result in found.evaluations[name].get("needle", {}).get("results", []):
            for variant in sorted({entry["variant"] for entry in result["accuracy"]}):
                entries = [entry for entry in result["accuracy"] if entry["variant"] == variant]
                head = [f"{entry['context_length'] // UNIT}K" for entry in entries]
                title = f"{result['model']}, {result['reading']}, {variant}"
                keys = ("context_length", "inside_window", "outside_window", "value_nats_inside", "value_nats_outside")
                page.results[title] = [{key: e.get(key) for key in keys} for e in entries]
                right = sum(e["all"]["mean"] * e["all"]["n"] for e in entries)
                nats = [f"{mean(e.get('value_nats_inside'))} / {mean(e.get('value_nats_outside'))}" for e in entries]
                rows.append([title, f"{right:.0f} of {sum(e['all']['n'] for e in entries)}", *nats])
    page.table(
        "Found, and nats to spell the value, needle inside / outside the last 1024 tokens:",
        ["", "found", *head],
        rows,
    )
    return page


def decoding(found: Results) -> Page:
    page = Page("decoding", "How well models continue a text", "Judged by another model's loss.")
    rows, head = [], []
    for name in sorted(found.evaluations):
        content = found.evaluations[name].get("judge", {})
        for verdict in content.get("verdicts", []):
            entries = [entry for entry in verdict["by_position"] if entry["start"] >= content["prompt_tokens"]]
            head = [f"{entry['start']}–{entry['end']}" for entry in entries]
            title = f"{verdict['writer']}, {verdict['reading']} (judge {content['judge']})"
            page.results[title] = {key: value for key, value in verdict.items() if key != "seconds"}
            whole = verdict["continuation"]["nats_per_token"]
            positions = (mean(entry["score"]["nats_per_token"]) for entry in entries)
            rows.append([title, *positions, interval(whole), f"{verdict['repeated']['mean']:.1%}"])
    page.table("Judge's nats per token by position:", ["", *head, "all", "repeated"], rows)
    return page


def job(method: str, seed: int, length: int) -> str:
    return f"{method}-s{seed}" + (f"-{length}" if length > 1 else "")


PAGES: dict[Callable[[Results], Page], tuple[str, ...]] = {
    box: ("box-32",),
    context: tuple(job(method, seed, L) for method in ("e2e", "full", "swa") for seed in (1, 2) for L in (1, 32)),
    meta: ("e2e-s0", "swa-s0", "meta-first-order"),
    stability: tuple(f"stable-{name}" for name in STABILITY),
    ablation: tuple(f"ablate-{name}" for name in ablations(UNIT)),
    kvb: ("kvb-s0", "swa-s0"),
    toy: ("toy-none", "toy-full", "toy-e2e-16", "toy-naive"),
    needle: (),
    decoding: (),
}
"""What makes each page, and the jobs without which there is none."""


if __name__ == "__main__":
    sys.exit(main())
