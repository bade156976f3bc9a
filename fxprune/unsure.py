"""What a record of one run cannot know of others: freeze what they may use in another way."""

from __future__ import annotations

from torch import fx

from .flow import Flow
from .ids import Value
from .trees import leaves


def freeze_unsure(flow: Flow) -> list[str]:
    """Freeze what other inputs may use in another way than the recorded one; warnings of it."""
    for node in flow.graph.graph.nodes:
        if node.meta.get("after_read") and node in flow.rules:
            _freeze_cut(flow, node)
    sizes: dict[str, set[int]] = flow.graph.meta.get("fxprune_idle", {})
    if not sizes:
        return []
    _freeze_as_wide(flow, sizes)
    idle = list(sizes)
    names = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
    return [
        f"{names} did not run on the example inputs: what is as wide as their weights stays, but "
        "an input that takes another way may meet widths that do not fit"
    ]


def _freeze_cut(flow: Flow, node: fx.Node) -> None:
    """Where a cut lies may come from values that were read before, and differ elsewhere."""
    if flow.rules[node].rule.kind != "move" or not node.all_input_nodes:
        return
    made = [la.ids for v in leaves(flow.values[node], Value) for la in v.layers]
    for value in leaves(flow.values.get(node.all_input_nodes[0]), Value):
        for layer in value.layers:
            if any(ids.numel() < layer.ids.numel() for ids in made):
                flow.ids.freeze(node, layer.ids, "is cut after forward has read values")


def _freeze_as_wide(flow: Flow, idle: dict[str, set[int]]) -> None:
    """Channels as many as a dim of a weight that was not used has, and which it may read."""
    for slots in flow.ids.slots.values():
        for slot in slots:
            names = [name for name, sizes in idle.items() if slot.ids.numel() in sizes - {1}]
            if names and slot.role in ("out", "free"):
                why = f"is as wide as {names[0]}, which did not run on the example inputs"
                flow.ids.freeze(slot.node, slot.ids, why)
