"""The page of a drill."""

from __future__ import annotations

from typing import Any

_AGAIN = {"torchrun": "torchrun", "--resume": "a user, `--resume`", "": "not needed"}


def page(found: dict[str, Any]) -> str:
    """Markdown of what `python -m tests.drill --json` writes."""
    rows, hardware = found["faults"], found["hardware"]
    survived = sum("wrong" not in row for row in rows)
    exact = sum(row.get("difference") == 0 for row in rows)
    about = f"""\
A microscopic model in float64 takes {found["steps"]} steps, with a checkpoint each {found["every"]}. In each row a run
meets one fault, at a rank and a place drawn from the seed, and is started again. {survived} of {len(rows)} became the
undisturbed run: losses and weights bit for bit in {exact}, within 1e-12 where sums came in another order.
Before a user starts it again, weights and moments of every finished checkpoint that the undisturbed run has too are the
same byte for byte. In the end there are no processes, no temporaries and two checkpoints.
No rank showed a traceback."""
    places = """\
Ranks are forks of one process, which meet at a store like torchrun's, or are started by torchrun itself. A place is the
n-th time that a rank comes to one of the calls in `tests/drill/injection.py`; "disk" is every touch of the disk."""
    lines = [
        f"# Fault drill of {rows[0]['ranks']} ranks",
        f"`{found['command']}`, commit {found['commit']}, {found['versions']}, gloo on {hardware['processor']}.",
        about.replace("\n", " "),
        places.replace("\n", " "),
        "| # | fault | where | started by | again by | apart | what was said |\n|--:|---|---|---|---|--:|---|\n",
    ]
    return "\n\n".join(lines) + "".join(_line(row) for row in rows)


def _line(row: dict[str, Any]) -> str:
    said = [line.removeprefix("longread: ") for line in row.get("said", [])]
    said.sort(key=lambda line: (not line.startswith("error"), ": waited " in line))  # causes first
    said += [line.removeprefix("longread: ") for line in row.get("said again", [])]
    first = row.get("wrong") or (said[0].partition("; the ")[0].partition("; nothing")[0] if said else "")
    if "read" in row:
        first = f"{first + '; ' if first else ''}meanwhile {row['read']}"
    apart = f"{row['difference']:.1g}" if "difference" in row else "**wrong**"
    cells = [row["number"], row["fault"], row["where"], row["by"], _AGAIN[row["again"]], apart, first]
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"
