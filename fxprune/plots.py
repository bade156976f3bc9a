"""Pictures of reports and sensitivities. matplotlib is only imported to draw; none of its global
state is used."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .check import check_choice
from .errors import OptionError, nearest
from .layers import Change, LayerRow, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .curves import Sensitivity
    from .report import Report

What = Literal["widths", "params", "macs", "scores"]

# Of the palette of Okabe and Ito, which colour-blind people can tell apart.
_AFTER, _GONE, _BEFORE = "#0072B2", "#E69F00", "#CBD2D9"
_LINES = (_AFTER, "#D55E00", "#009E73", "#CC79A7", _GONE, "#56B4E9")
_WIDE, _LONGEST = 9.0, 54  # inches; characters of a name
_SMALL_SHARE = 0.005  # of the network: layers below it that do not multiply are joined
_BINS = 40
_TALL = 50  # bars, above which they are thinner, and the scale stands at both ends


def plot(report: Report, what: What, group: str | None, ax: Axes | None) -> Figure:
    """See `Report.plot`."""
    check_choice("what", what, ("widths", "params", "macs", "scores"))
    if group is not None and what != "scores":
        raise OptionError(
            f"group={group!r} is for scores, not for {what}",
            hint='report.plot("scores", group=...)',
        )
    check_matplotlib()
    if what == "scores":
        return _scores(report, group, ax)
    return _bars(report, _KINDS[what], ax)


def check_matplotlib() -> None:
    """`OptionError` where it is missing."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        hint = "pip install 'fxprune[plot]'"
        raise OptionError("plots need matplotlib, which is not installed", hint=hint) from None


# -- figures ---------------------------------------------------------------------------------------


def _axes(ax: Axes | None, height: float) -> Axes:
    """The axes given, or those of a figure of its own."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that notebooks show, whatever is set up there."""

        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png")
            return out.getvalue()

    made: Any = Picture(figsize=(_WIDE, height), dpi=120, layout="constrained")
    return made.add_subplot()


def _figure(ax: Axes) -> Figure:
    found: Any = ax.figure
    return found.figure  # of subfigures, the whole one


def _headed(ax: Axes, title: str, columns: int, *, above: float = 0) -> None:
    """The title, and under it the legend, above all bars, `above` points from them."""
    ax.set_title(title, loc="left", fontsize=11, pad=26 + above)
    ax.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=8,
        borderaxespad=0.2 + above / 8, handlelength=1.2,
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)


# -- layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What is drawn of each layer."""

    of: Callable[[LayerRow], Change | None]
    title: Callable[[Report], str]


def _total(change: Change, what: str) -> str:
    return f"{change[0]:,} {what} before, {change[1]:,} after"


_KINDS = {
    "widths": _Kind(lambda row: row.width, lambda _: "channels that each layer makes"),
    "params": _Kind(lambda row: row.params, lambda r: _total(r.params, "parameters")),
    "macs": _Kind(lambda row: row.macs, lambda r: _total(r.macs, "multiply-accumulates")),
}


def _bars(report: Report, kind: _Kind, ax: Axes | None) -> Figure:
    bars = _joined(report.layers, kind)
    if not bars:
        hint = "reports of fxprune.prune, apply and load know them"
        raise OptionError("this report knows no layers", hint=hint)
    row = 0.22 if len(bars) <= _TALL else 0.15 if len(bars) <= 120 else 0.12
    ax = _axes(ax, 1.3 + row * len(bars))
    _draw(ax, bars, per_cent=kind is not _KINDS["widths"])
    _headed(ax, f"{report.model}: {kind.title(report)}", 2, above=14 * (len(bars) > _TALL))
    return _figure(ax)


def _joined(layers: Sequence[LayerRow], kind: _Kind) -> list[tuple[str, Change]]:
    """Layers in order; small ones that do not multiply as one bar at the end."""
    known = [(row, change) for row in layers if (change := kind.of(row)) and change[0]]
    least = _SMALL_SHARE * sum(change[0] for _, change in known)
    large = [row.macs[0] > 0 or change[0] >= least for row, change in known]
    rest = [change for (_, change), own in zip(known, large, strict=True) if not own]
    shown = [(row.name, change) for (row, change), own in zip(known, large, strict=True) if own]
    if rest:
        total = sum(old for old, _ in rest), sum(new for _, new in rest)
        shown.append((f"{len(rest)} others (norms and the like)", total))
    return shown


def _draw(ax: Axes, bars: Sequence[tuple[str, Change]], *, per_cent: bool) -> None:
    places = range(len(bars))
    before, after = (np.array([change[i] for _, change in bars], float) for i in (0, 1))
    ax.barh(places, before, 0.8, color=_BEFORE, label="before")
    ax.barh(places, after, 0.8, color=_AFTER, label="after")
    _name(ax, bars, _left if per_cent else _narrowed)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, before.max() * 1.12)
    ax.xaxis.set_major_formatter(_engineering)
    ax.tick_params(axis="x", labelsize=8, top=len(bars) > _TALL, labeltop=len(bars) > _TALL)
    ax.grid(axis="x", color="#E3E6E9", linewidth=0.6)
    ax.set_axisbelow(True)


def _name(ax: Axes, bars: Sequence[tuple[str, Change]], text: Callable[[Change], str]) -> None:
    """Names before the bars, and figures behind them; in small axes not of all."""
    size, step = _fit(ax, len(bars))
    shown = list(enumerate(bars))[::step]
    ax.set_yticks([place for place, _ in shown], [_short(n) for _, (n, _) in shown], fontsize=size)
    ax.tick_params(axis="y", length=0)
    how: Any = {"textcoords": "offset points", "va": "center", "color": "#444444"}
    for place, (_, change) in shown:
        ax.annotate(text(change), (change[0], place), (3, 0), fontsize=size, **how)


def _left(change: Change) -> str:
    before, after = change
    return "<1%" if 0 < after < before / 100 else f"{after / before:.0%}"


def _narrowed(change: Change) -> str:
    before, after = change
    return f"{before:,} → {after:,}" if after != before else f"{before:,}"


def _fit(ax: Axes, rows: int) -> tuple[float, int]:
    """The size of letters that fits the height of a row, and each how many rows have a name."""
    height: Any = ax.get_window_extent().height / _figure(ax).dpi
    points = 72 * height / max(rows, 1)
    return float(np.clip(0.75 * points, 5, 8)), max(1, math.ceil(6 / points))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def _engineering(value: float, place: object = None) -> str:
    """12000000 as 12M."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


# -- scores ----------------------------------------------------------------------------------------


def _scores(report: Report, group: str | None, ax: Axes | None) -> Figure:
    if not report.scores:
        raise OptionError(
            "this report has no scores",
            hint="it has them after fxprune.prune, or where the plan was made with scores=True",
        )
    of, found, unit = _chosen(report, group)
    ax = _axes(ax, 4.2)
    gone, stay = found.values[~found.kept], found.values[found.kept]
    labels = [f"{len(gone):,} removed", f"{len(stay):,} kept"]
    ax.hist([gone, stay], _edges(found), stacked=True, color=[_GONE, _AFTER], label=labels)
    if found.cut is not None:
        ax.axvline(found.cut, color="black", linewidth=1.2, linestyle="--", label="cut")
    ax.set_xlabel(unit, fontsize=9)
    ax.set_ylabel("channels", fontsize=9)
    ax.tick_params(labelsize=8)
    _headed(ax, f"{report.model}: scores by {report.criterion} of {of}", 3)
    return _figure(ax)


def _edges(scores: Scores) -> list[float]:
    """The bounds of bins. The cut is one of them, so that no bin has both sides of it."""
    values, cut = scores.values, scores.cut
    low, high = float(values.min()), float(values.max())
    around = 0 if low < high else 0.1 * abs(low) or 0.5  # of scores that are all equal
    edges = np.linspace(low - around, high + around, 1 + min(_BINS, max(5, len(values) // 2)))
    if cut is None:
        return edges.tolist()
    width = edges[1] - edges[0]
    below, above = (
        math.ceil(max(0, far) / width + 1e-9) for far in (cut - edges[0], edges[-1] - cut)
    )
    return (cut + width * np.arange(-below, above + 1)).tolist()


def _chosen(report: Report, group: str | None) -> tuple[str, Scores, str]:
    """What is drawn: of what, its scores, and what they are measured in."""
    if group is not None:
        return group, _together(_named(report, group)), "score"
    lost = [each for each in report.scores.values() if each.cut is not None]
    if not lost:
        raise OptionError("no group lost channels", hint='report.plot("scores", group=...)')
    left = len(report.scores) - len(lost)
    of = f"{len(lost)} groups" + (f"; {left} lost nothing" if left else "")
    if report.scope == "global" or any((each.cut or 0) <= 0 for each in lost):
        return of, _together(lost), "score"
    relative = [Scores(each.values / (each.cut or 1), each.kept) for each in lost]
    return of, _together(relative), "score, relative to the cut of its group"


def _named(report: Report, group: str) -> list[Scores]:
    named = {i: report.groups[i].name for i in report.scores}
    found = [report.scores[i] for i, name in named.items() if name == group]
    if not found:
        hint = nearest(group, named.values()) or "report.groups lists them"
        raise OptionError(f"no group `{group}` has scores", hint=hint)
    return found


def _together(scores: Sequence[Scores]) -> Scores:
    values, kept = ([getattr(each, part) for each in scores] for part in ("values", "kept"))
    return Scores(np.concatenate(values), np.concatenate(kept))


# -- sensitivities ---------------------------------------------------------------------------------


def curves(found: Sensitivity, ax: Axes | None) -> Figure:
    """See `Sensitivity.plot`."""
    check_matplotlib()
    if not found.groups:
        raise OptionError("no group has a curve", hint="ask for higher rates, or for other groups")
    ax = _axes(ax, 5.2)
    named = found.ranking[: len(_LINES)]
    for name in found.ranking[len(_LINES) :]:
        _line(ax, found.groups[name], _BEFORE, 1.0, 1)
    for name, color in reversed(list(zip(named, _LINES, strict=False))):
        _line(ax, found.groups[name], color, 1.8, 2)
    _scaled(ax, found)
    _label_ends(ax, [(name, _LINES[i], found.groups[name]) for i, name in enumerate(named)])
    rest = len(found.groups) - len(named)
    also = f"; the {rest} least sensitive of {len(found.groups)} groups in grey" if rest > 0 else ""
    ax.set_title(
        f"{found.model}: one group pruned alone, by {found.criterion}{also}",
        loc="left",
        fontsize=11,
    )
    return _figure(ax)


def _line(ax: Axes, curve: Sequence[tuple[float, float]], color: str, width: float, z: int) -> None:
    rates, losses = zip((0.0, 0.0), *curve, strict=True)
    how: Any = {"color": color, "linewidth": width, "zorder": 2 + z, "markersize": 2 + width}
    ax.plot(rates, losses, marker="o", **how)


def _scaled(ax: Axes, found: Sensitivity) -> None:
    """A log scale with zero on it: losses span decades, and some are nothing, or below."""
    sizes = [abs(loss) for curve in found.groups.values() for _, loss in curve]
    finite = sorted(size for size in sizes if 0 < size < math.inf)
    if finite and finite[-1] > 20 * finite[0]:
        threshold = max(finite[len(finite) // 10], finite[-1] / 1e4)
        ax.set_yscale("symlog", linthresh=threshold, linscale=0.4)
    ax.axhline(0, color="#888888", linewidth=0.8)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(_percent)
    ax.set_xlabel("share of the group's channels that went", fontsize=9)
    what = "loss" if found.measure == "loss" else "metric"
    ax.set_ylabel(f"{what} {'added' if what == 'loss' else 'lost'}", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(color="#E3E6E9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _percent(value: float, place: object = None) -> str:
    return f"{value:.0%}"


def _label_ends(ax: Axes, lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]]) -> None:
    """Names beside the ends of lines, in their order, moved apart where they would overlap."""
    _figure(ax).draw_without_rendering()
    scale = 72 / _figure(ax).dpi
    points = [(ax.transData.transform(curve[-1])[1] * scale, each) for each in lines
              if math.isfinite((curve := each[2])[-1][1])]  # fmt: skip
    right = ax.transData.transform((1.0, 0.0))[0] * scale
    last = -math.inf
    for height, (name, color, curve) in sorted(points, key=lambda each: each[0]):
        last = max(height, last + 11)
        start = ax.transData.transform(curve[-1]) * scale
        ax.annotate(
            _short(name), curve[-1], (right - start[0] + 6, last - start[1]),
            textcoords="offset points", fontsize=8, color=color, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6},
        )  # fmt: skip
