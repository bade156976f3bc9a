"""What came out, over all seeds: a table on screen, results.json, results.md and results.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .loop import write, write_text

Run = dict[str, Any]
"""What one row of one seed measured; the fields are those of its JSON file."""
COSTS = {"macs": "MACs", "slimming": "slimming FLOPs"}
NOTES = {
    "macs": "MACs: multiply-accumulates of convolutions and linear layers.",
    "slimming": "slimming FLOPs: as Network Slimming's code counts them, ours and the paper's "
    "alike; not to be compared with MACs.",
}


@dataclass(frozen=True)
class Line:
    """One row of the table: the runs of one recipe at one rate, a seed each."""

    runs: Sequence[Run]
    dense: Sequence[Run]
    """The runs of the unpruned network, of the same seeds."""

    @property
    def recipe(self) -> str:
        return self.runs[0]["recipe"] or "dense, fine-tuned alike"

    def mean(self, name: str) -> float:
        return statistics.fmean(run[name] for run in self.runs)

    def spread(self, name: str) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        values = [run[name] for run in self.runs]
        return statistics.stdev(values) if len(values) > 1 else None

    def left(self, name: str) -> float:
        """The share of the dense network's parameters, MACs or milliseconds."""
        return self.mean(name) / statistics.fmean(run[name] for run in self.dense)

    @property
    def change(self) -> float:
        """Accuracy after fine-tuning less that of the dense network after the same fine-tuning."""
        return self.mean("after") - statistics.fmean(run["after"] for run in self.dense)

    def numbers(self) -> dict[str, Any]:
        """The line as plain numbers; accuracies are shares."""
        names = ("before", "after", "parameters", "macs", "slimming", "ms")
        first = {name: self.runs[0][name] for name in ("recipe", "asked")}
        means: dict[str, Any] = {name: self.mean(name) for name in names}
        means |= {f"{name}_spread": self.spread(name) for name in ("before", "after")}
        rates = [run["rate"] for run in self.runs]
        relative = self.mean("after") / statistics.fmean(run["after"] for run in self.dense) - 1
        return first | {"rates": rates, "change": self.change, "relative": relative} | means


def lines(runs: Sequence[Run]) -> list[Line]:
    """The runs of all seeds, by recipe and rate, in the order of the first seed."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run["recipe"], run["asked"]), []).append(run)
    dense = next(own for (recipe, _), own in found.items() if not recipe)
    return [Line(own, dense) for own in found.values()]


@dataclass(frozen=True)
class Results:
    """All lines with what they were measured on. `paper` gives the paper's own figures for a line,
    by column; `cost` is the count that is shown, "macs" or "slimming"."""

    about: Mapping[str, Any]
    lines: Sequence[Line]
    paper: Callable[[Line], Mapping[str, str]]
    cost: str
    title: str
    note: str

    @property
    def notes(self) -> list[str]:
        papers = [self.note] if any(map(self.paper, self.lines)) else []
        tested = self.about["images"][1]
        return [
            *papers,
            "pruned: accuracy right after pruning. tuned: after fine-tuning. change: points of "
            "`tuned` against the dense network, which got the same fine-tuning.",
            f"{tested:,} test images: one of them is {100 / tested:.2g} points.",
            NOTES[self.cost],
            f"ms: median for {self.about['latency_batch']} images on one thread, beside the dense "
            "network's in the same rounds.",
        ]

    def cells(self) -> list[dict[str, str]]:
        """A dict a line; all have the same columns in the same order."""
        papers = [self.paper(line) for line in self.lines]
        columns = dict.fromkeys(name for own in papers for name in own)
        return [
            _cells(line, self.cost) | {f"paper: {name}": own.get(name, "") for name in columns}
            for line, own in zip(self.lines, papers, strict=True)
        ]

    def table(self) -> Table:
        cells = self.cells()
        table = Table(title=self.title, caption="\n".join(self.notes), caption_justify="left")
        for i, name in enumerate(cells[0]):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in cells:
            table.add_row(*row.values())
        return table

    def markdown(self) -> str:
        cells = self.cells()
        ruler = ["---", *["---:"] * (len(cells[0]) - 1)]
        rows = [list(cells[0]), ruler, *(list(row.values()) for row in cells)]
        about = [f"- {name}: {json.dumps(value)}" for name, value in self.about.items()]
        body = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join(
            [f"# {self.title}", "", *body, "", "\n\n".join(self.notes), "", *about, ""]
        )

    def plain(self) -> dict[str, Any]:
        rows = [line.numbers() | {"paper": dict(self.paper(line))} for line in self.lines]
        return {
            "about": dict(self.about),
            "rows": rows,
            "runs": [r for x in self.lines for r in x.runs],
        }

    def write(self, folder: Path) -> list[str]:
        """Write the files; the names of those written, and a line for one that could not be."""
        text = {"results.json": json.dumps(self.plain(), indent=1), "results.md": self.markdown()}
        for name, content in text.items():
            write_text(folder / name, content)
        try:
            self.plot(folder / "results.png")
        except ImportError:
            return [*text, "no plot: matplotlib is not installed"]
        return [*text, "results.png"]

    def plot(self, file: Path) -> None:
        """Accuracy over the cost that is left, by recipe; ImportError without matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for recipe, own in _by_recipe(self.lines).items():
            x = [100 * line.left(self.cost) for line in own]
            y = [100 * line.mean("after") for line in own]
            bars = [100 * (line.spread("after") or 0) for line in own]
            axes.errorbar(x, y, bars, marker="o", capsize=3, label=recipe)
        axes.set(xlabel=f"{COSTS[self.cost]} left, %", ylabel="accuracy after fine-tuning, %")
        axes.set_title(self.title, fontsize=9)
        axes.invert_xaxis()
        axes.legend(fontsize=8)
        write(file, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _by_recipe(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.recipe, []).append(line)
    return {recipe: sorted(own, key=lambda x: -x.mean("macs")) for recipe, own in found.items()}


def _cells(line: Line, cost: str) -> dict[str, str]:
    dense = not line.runs[0]["recipe"]
    return {
        "recipe": line.recipe,
        "rate": "" if dense else f"{line.mean('rate'):.3g}",
        "pruned, %": _percent(line, "before"),
        "tuned, %": _percent(line, "after"),
        "change": "" if dense else f"{100 * line.change:+.2f}",
        "parameters": _size(line, "parameters"),
        COSTS[cost]: _size(line, cost),
        "ms (dense)": f"{line.mean('ms'):.1f} ({line.mean('dense_ms'):.1f})",
    }


def _percent(line: Line, name: str) -> str:
    spread = line.spread(name)
    return f"{100 * line.mean(name):.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _size(line: Line, name: str) -> str:
    removed = 1 - line.left(name)
    return f"{line.mean(name):,.0f}" + (f" (-{removed:.1%})" if removed else "")
