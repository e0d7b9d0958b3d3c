"""The page of the measurements, in Markdown: the figures, and how far each is from what the machine gives at best."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import date

from longread.bench.cases import MEASURES, METHODS, PARALLEL, STARTS, Case
from longread.bench.machine import Machine
from longread.bench.rows import Row
from longread.bench.run import Outcome
from longread.evaluate import markdown_table
from longread.flops import decoding_bytes, reading_flops, training_flops

Cells = list[str]
NAMES = {"e2e": "TTT-E2E", "swa": "SWA", "full": "full attention"}
TITLES = {
    "train": "Training, one step of `longread train`",
    "first-step": "First step in a fresh process, compilation included",
    "prefill": "Prefill",
    "decode": "Decoding, greedy",
    "first-read": "First tokens that a fresh process reads, and as many after them",
    "first-token": "From the start of a process to the first token that it writes after a prompt",
}
_PARALLEL_NOTES = (
    "Steps of `longread train` in as many processes, votes of the ranks included, by the slowest rank of each; then, "
    "in the same processes, the same load on one GPU while the others wait. n measurements, their median and range."
)


def seconds_per_token(row: Row) -> float:
    """Of training, reading or writing; `row` is of none of `STARTS`."""
    return row["value"] / 1e3 / 1024 if row["measure"] == "prefill_ms_per_1k" else 1 / row["value"]


def work_per_token(row: Row) -> float:
    """Floating-point operations of a token that was trained on or read; bytes of one that was written."""
    case = Case.of_row(row)
    config = case.config
    if case.work == "train":
        return training_flops(config.model, case.context, config.loss)
    if case.work == "prefill":
        return reading_flops(config.model, case.context, scored=case.method != "full")
    return decoding_bytes(config.model, case.context, 2 if row["versions"]["driver"] else 4)


def share_of_peak(row: Row, machine: Machine) -> float:
    """Of the measured product's rate, or of the measured bandwidth where tokens are written."""
    rate = work_per_token(row) / seconds_per_token(row) / row.get("gpus", 1)
    return rate / (machine.bandwidth if row["measure"] == "decode_tokens_per_s" else machine.flops)


def times_full_attention(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times as long as full attention of the same device it takes; None if that is not among the rows."""
    same = [
        other
        for other in rows
        if other["method"] == "full"
        and all(other[key] == row[key] for key in ("measure", "size", "context", "sequences"))
        and other["versions"].get("device") == row["versions"].get("device")
    ]
    return seconds_per_token(row) / seconds_per_token(same[0]) if same else None


def markdown(outcome: Outcome, *, command: str, hardware: object, title: str = "Speed and memory") -> str:
    """The whole page."""
    parts = [f"# {title}, {date.today()}", f"`{command}`", _conditions(outcome, hardware), _gates(outcome)]
    for work, measure in MEASURES.items():
        rows = [row for row in outcome.rows if row["measure"] == measure]
        if rows:
            parts += [f"## {TITLES[work]}", _notes(work, outcome), _table(work, rows, outcome)]
    if rows := [row for row in outcome.rows if row["measure"] == PARALLEL]:
        parts += ["## Training on several GPUs", _PARALLEL_NOTES, _parallel_table(rows)]
    if outcome.failures:
        parts += ["## Not measured", "\n".join(f"- {case}: {reason}" for case, reason in outcome.failures)]
    if outcome.profiles:
        parts += ["## Where the time goes"]
        parts += [f"### {case}\n\n{text}" for case, text in outcome.profiles.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _conditions(outcome: Outcome, hardware: object) -> str:
    lines = [f"Random tokens, drawn weights. Hardware: {json.dumps(hardware)}."] if hardware else []
    lines += [f"Versions: {found}." for found in dict.fromkeys(json.dumps(row["versions"]) for row in outcome.rows)]
    commits = ", ".join(dict.fromkeys(row["commit"] or "unknown" for row in outcome.rows))
    lines += [f"Commit: {commits}."] if outcome.rows else []
    if machine := outcome.machine:
        lines.append(
            f"Measured in the same run on {machine.name}: a {machine.matmul} product {machine.flops / 1e12:.4g} "
            f"TFLOP/s, the peak below; copying {machine.bandwidth / 1e9:.4g} GB/s, read and written together."
        )
        timed = [row for row in outcome.rows if Case.of_row(row).work not in STARTS]
        if any(share_of_peak(row, machine) > 1 for row in timed):
            lines.append(
                "**A share of more than 100 % below says that this peak is none**: the machine did other work while it "
                "was measured, or its caches are faster than its memory. Trust times and ratios, not floors."
            )
    return "\n".join(lines)


def _gates(outcome: Outcome) -> str:
    if not outcome.verdicts:
        return ""
    return "## Gate\n\n" + "\n".join(f"- {verdict}" for verdict in outcome.verdicts)


def _notes(work: str, outcome: Outcome) -> str:
    floor = (
        "FLOPs count every product of the model once; × floor is the time over that of the same operations at the "
        "peak. n measurements, their median and range."
    )
    if work == "train":
        return f"{floor} Gradient, norm, clipping and AdamW."
    if work == "first-step":
        return "With no compiled kernel on the disk; PyTorch, the device and the weights are there already."
    if work == "first-read":
        return (
            "Seconds, with compiled kernels on the disk and with nothing compiled; PyTorch, the device and the weights "
            "are there already."
        )
    if work == "first-token":
        return "A model in the box, compiled kernels on the disk; seconds of importing, opening, reading and writing."
    if work == "prefill":
        return (
            f"{floor} TTT-E2E and SWA score every token in constant memory, TTT-E2E reads one more, the last target; "
            "full attention reads in one pass and gives the logits of the last. Where its keys and values would not "
            "fit, one block is timed over the whole context, and counted as often as there are blocks."
        )
    return (
        "Through `Session.generate`, inner steps included. × floor is the time over that of reading weights, fast "
        "weights and window once a token at the bandwidth of copying."
    )


def _table(work: str, rows: Sequence[Row], outcome: Outcome) -> str:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("size", lambda row: row["size"]),
        ("context", lambda row: f"{row['context']:,}"),
        ("sequences", lambda row: str(row["sequences"])),
        ("method", _method),
        (f"{rows[0]['unit']}{' per 1K tokens' if work == 'prefill' else ''}", lambda row: f"{row['value']:,.6g}"),
        ("range", _spread),
        ("n", lambda row: str(row["n"])),
    ]
    machine = outcome.machine
    columns += [(part, lambda row, part=part: f"{row['parts'][part]:.2f}") for part in rows[0].get("parts", ())]  # type: ignore[misc]
    if work == "first-read":
        columns.append(("tokens/s, first", lambda row: f"{row['context'] / row['value']:,.0f}"))
        columns.append(("tokens/s, next", lambda row: f"{row['context'] / row['parts']['next']:,.0f}"))
    if work not in STARTS:
        unit = "GB a token" if work == "decode" else "GFLOP a token"
        columns += [
            ("time / full", lambda row: _number(times_full_attention(row, rows))),
            (unit, lambda row: f"{work_per_token(row) / 1e9:.3g}"),
        ]
        if machine is not None:
            columns += [
                ("% of peak", lambda row: f"{100 * share_of_peak(row, machine):.1f}"),
                ("× floor", lambda row: f"{1 / share_of_peak(row, machine):.2f}"),
            ]
    columns.append(("peak GiB", lambda row: _gib(row["peak_gib"])))
    if any("recompute" in row for row in rows):
        columns.append(("computed again", lambda row: row.get("recompute", "")))
    ordered = sorted(rows, key=lambda row: (row["context"], METHODS.index(row["method"])))
    ordered.sort(key=lambda row: [row["size"] for row in rows].index(row["size"]))
    return markdown_table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in ordered])


def _method(row: Row) -> str:
    return NAMES[row["method"]] + (f", one block × {row['blocks']}" if "blocks" in row else "")


def _parallel_table(rows: Sequence[Row]) -> str:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("size", lambda row: row["size"]),
        ("context", lambda row: f"{row['context']:,}"),
        ("sequences a GPU", lambda row: str(row["sequences"])),
        ("method", lambda row: NAMES[row["method"]]),
        ("GPUs", lambda row: str(row["gpus"])),
        ("update", lambda row: row["update"]),
        ("state parallel", lambda row: str(row["state_parallel"])),
        ("tokens/s", lambda row: f"{row['value']:,.6g}"),
        ("range", _spread),
        ("n", lambda row: str(row["n"])),
        ("one GPU", lambda row: "" if row["one_gpu"] is None else f"{row['one_gpu']:,.6g}"),
        ("range", lambda row: _spread({"spread": row["one_gpu_spread"]})),
        ("ratio", lambda row: _number(row["ratio"])),
        ("peak GiB a GPU", lambda row: _gib(row["peak_gib"])),
        ("by the estimate", lambda row: _gib(row["estimated_gib"])),
        ("peak of one GPU", lambda row: _gib(row["one_gpu_peak_gib"])),
        ("computed again", lambda row: row["recompute"]),
    ]
    return markdown_table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows])


def _gib(size: float | None) -> str:
    return "" if size is None else str(size)


def _spread(row: Row) -> str:
    return "" if row["spread"] is None else f"{row['spread'][0]:,.6g}–{row['spread'][1]:,.6g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
