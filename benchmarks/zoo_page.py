"""The page of a run over whole zoos, made from its records alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import common

Record = dict[str, Any]
Lists = dict[str, list[str]]
MANY = 0.7  # a share of prunable channels that counts as much
UNBUILT = "not built"

HOW = """{versions}.

Every network has random weights and runs in a process of its own, on one thread, with a batch of
one. Half of the channels of each group are removed by L2 norms, `fxprune.prune(model, args,
rate=0.5)` with all defaults beside `torch_pruning.pruner.BasePruner` with
`GroupMagnitudeImportance(p=2)`, ratio 0.5, last layers ignored and heads named as its documentation
recommends.

`ok`: the pruned network runs, its outputs are nested and shaped as before, and parameters went.
`silently wrong`: all that, but it does not compute what the original computes with the removed
channels set to zero; normalisations over channels take statistics over the kept ones in both.
The comparison is our own for both tools, and `not compared` where that reference cannot model an op
over channels that went. Seconds of fxprune are with its own verification of numbers; `unverified`
is without. Memory is the peak above that of the loaded network.
"""


def publish(lists: Lists, records: list[Record], out: str, note: str = "") -> None:
    """Write the page, and print its summary; `note` says how this run was made."""
    lists = {title: lists[title] for title in sorted(lists, key=lambda t: len(lists[t]))}
    lists = {title: names for title, names in lists.items() if _of(records, names)}
    summary = ("Summary", SUMMARY, summaries(lists, records))
    common.show(*summary)
    packages = common.versions("torchvision", "timm", "torch-pruning")
    parts = [HOW.format(versions=packages), *([f"{note}\n"] if note else [])]
    parts.append(common.markdown(*summary))
    for title, names in lists.items():
        parts += [f"{line}\n" for line in headlines(title, _of(records, names))]
    parts.append(common.markdown("Misses", MISSES, misses(records)))
    parts += [common.markdown(*table) for table in family_tables(lists, records)]
    common.write(out, "Whole zoos", parts)


def family_tables(lists: Lists, records: list[Record]) -> Iterable[tuple[str, Any, Any]]:
    """A table for each list with a family that no list before it has."""
    shown: set[str] = set()
    for title, names in lists.items():
        found = _of(records, names, "fxprune")
        if known := {r["family"] for r in found if "family" in r} - shown:
            shown |= known
            yield f"fxprune by family: {title}", FAMILIES, families(found)


def _of(records: Iterable[Record], names: Sequence[str], tool: str = "") -> list[Record]:
    known = {(r["name"], r["tool"]): r for r in records}
    tools = [tool] if tool else dict.fromkeys(r["tool"] for r in known.values())
    return [known[name, t] for t in tools for name in names if (name, t) in known]


# -- summary ---------------------------------------------------------------------------------------

SUMMARY = (
    "list", "tool", "networks", "built", "ok", "share", "silently wrong", "same as masked",
    "not compared", "seconds", "unverified", "median MB", "largest MB", "MB in all",
)  # fmt: skip


def summaries(lists: Lists, records: list[Record]) -> list[list[str]]:
    rows = []
    for title, names in lists.items():
        for tool in dict.fromkeys(r["tool"] for r in records):
            found = _of(records, names, tool)
            if 2 * len(found) >= len(names):  # a tool that other lists alone were for has no row
                rows.append([title, tool, *summed(found)])
    return rows


def summed(records: list[Record]) -> list[str]:
    """Counts over the networks that could be built; times and memory over those that passed."""
    built = [r for r in records if r["verdict"] != UNBUILT]
    good = [r for r in built if r["verdict"] == "ok"]
    checks = Counter(r.get("check", {}).get("verdict", "") for r in built)
    wrong = sum(r["verdict"] == "silently wrong" for r in built)
    return [
        str(len(records)), str(len(built)), str(len(good)), share(len(good), len(built)),
        str(wrong), str(checks["same"]), str(checks["not compared"]),
        *(f"{sum(r.get(key, 0) for r in good):.0f}" for key in ("seconds", "seconds_unverified")),
        *(f"{value / 2**20:,.0f}" for value in spread([r.get("memory", 0) for r in good])),
    ]  # fmt: skip


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, largest and sum."""
    return (statistics.median(values), max(values), sum(values)) if values else (0, 0, 0)


def share(some: float, all_: float) -> str:
    return f"{some / all_:.1%}" if all_ else ""


def headlines(title: str, records: list[Record]) -> Iterable[str]:
    """How many families can lose most of their channels, by their smallest network here; of one
    that was never run it is not known whether it attends."""
    if 2 * sum(bool(r.get("large")) for r in records) > len(records):
        return
    plain = [r for r in smallest(records) if not r.get("attention") and not r.get("large")]
    for what, of in (("all channels", freedom), ("channels other than the outputs", inner_freedom)):
        many = sum(of(r) >= MANY for r in plain)
        yield (
            f"{title}: {many} of {len(plain)} CNN families (those without softmax attention) have "
            f">= {MANY:.0%} of {what} prunable."
        )


# -- misses ----------------------------------------------------------------------------------------

MISSES = ("network", "tool", "verdict", "why")


def misses(records: list[Record]) -> list[list[str]]:
    """Everything that is not ok, grouped by tool and verdict."""
    found = [r for r in records if r["verdict"] != "ok"]
    found.sort(key=lambda r: (r["tool"], r["verdict"], r["name"]))
    return [[f"`{r['name']}`", r["tool"], r["verdict"], r.get("why", "")] for r in found]


# -- families --------------------------------------------------------------------------------------

FAMILIES = (
    "family", "network", "verdict", "frontend", "attention", "of all channels", "of inner channels",
    "parameters left", "frozen because", "difference", "s", "unverified s", "MB",
)  # fmt: skip


def families(records: list[Record]) -> list[list[str]]:
    return [family_row(r) for r in smallest(records)]


def smallest(records: list[Record]) -> list[Record]:
    """The smallest network of every family that fxprune was tried on."""
    found: dict[str, Record] = {}
    mine = (r for r in records if r["tool"] == "fxprune" and r["verdict"] != UNBUILT)
    for record in sorted(mine, key=lambda r: (r["params"][0], r["name"])):
        found.setdefault(record["family"], record)
    return [found[family] for family in sorted(found)]


def freedom(record: Record) -> float:
    """The share of all channels that may go."""
    every = record.get("channels", 0)
    return record["prunable"] / every if every else 0.0


def inner_freedom(record: Record) -> float:
    """The share of those that are not the network's own outputs."""
    inner = record.get("channels", 0) - record.get("outputs", 0)
    return record["prunable"] / inner if inner else 0.0


def family_row(r: Record) -> list[str]:
    before, after = r["params"]
    known = "channels" in r
    reasons = "; ".join(f"{count:,} {reason}" for reason, count, *_ in r.get("frozen", ()))
    return [
        r["family"], f"`{r['name'].split(':')[1]}`", r["verdict"], r.get("frontend", ""),
        "yes" if r.get("attention") else "", f"{freedom(r):.0%}" if known else "",
        f"{inner_freedom(r):.0%}" if known else "", share(after, before) if after < before else "",
        reasons or (r.get("why", "") if r["verdict"] != "ok" else ""), verified(r),
        number(r, "seconds"), number(r, "seconds_unverified"), number(r, "memory", 2**20, 0),
    ]  # fmt: skip


def verified(record: Record) -> str:
    """What prune's own verification found, and in which dtype."""
    found = record.get("verified") or {}
    if found.get("difference") is None:
        return found.get("note", "")
    return f"{found['difference']:.0e} in {found['dtype']}"


def number(record: Record, key: str, unit: float = 1, digits: int = 1) -> str:
    return f"{record[key] / unit:,.{digits}f}" if key in record else ""
