"""fxprune: structured pruning of PyTorch networks, exact and inspectable.

``pruned = fxprune.prune(model, criterion="ratio_sum", rate=0.4)``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import criteria, errors, hub, models, recipes, rules, sparse
    from .analysis import Analysis
    from .api import analyze, apply, count, plan, prune, verify
    from .criteria import criterion
    from .curves import Sensitivity
    from .errors import FxpruneError
    from .finetuning import finetune
    from .group_lasso import GroupLasso
    from .growing import GrowingPenalty
    from .history import History
    from .iterating import iterate
    from .latencies import Latency, latency
    from .latency_table import LatencyTable
    from .masks import from_masks
    from .plans import Plan
    from .saving import load, save
    from .sensitivities import sensitivity
    from .sparse import SparsityPenalty
    from .verifier import Verification
    from .viewer import view

_HOMES = {
    "Analysis": "analysis",
    "FxpruneError": "errors",
    "GroupLasso": "group_lasso",
    "GrowingPenalty": "growing",
    "History": "history",
    "Latency": "latencies",
    "LatencyTable": "latency_table",
    "Plan": "plans",
    "Sensitivity": "curves",
    "SparsityPenalty": "sparse",
    "Verification": "verifier",
    "analyze": "api",
    "apply": "api",
    "count": "api",
    "criterion": "criteria",
    "finetune": "finetuning",
    "from_masks": "masks",
    "iterate": "iterating",
    "latency": "latencies",
    "load": "saving",
    "plan": "api",
    "prune": "api",
    "save": "saving",
    "sensitivity": "sensitivities",
    "verify": "api",
    "view": "viewer",
}
__all__ = [
    "Analysis",
    "FxpruneError",
    "GroupLasso",
    "GrowingPenalty",
    "History",
    "Latency",
    "LatencyTable",
    "Plan",
    "Sensitivity",
    "SparsityPenalty",
    "Verification",
    "analyze",
    "apply",
    "count",
    "criteria",
    "criterion",
    "errors",
    "finetune",
    "from_masks",
    "hub",
    "iterate",
    "latency",
    "load",
    "models",
    "plan",
    "prune",
    "recipes",
    "rules",
    "save",
    "sensitivity",
    "sparse",
    "verify",
    "view",
]


def __getattr__(name: str):
    """Public names are imported when they are first used, so that ``import fxprune`` is quick."""
    import importlib

    if name in _HOMES:
        found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in ("criteria", "errors", "hub", "models", "recipes", "rules", "sparse"):
        found = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'fxprune' has no attribute {name!r}")
    globals()[name] = found
    return found
