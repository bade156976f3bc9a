"""The ways from a model to a graph, and which of them is taken.

``symbolic``  the model's Python runs on tensors without data, and every call is written down
``export``    the model runs in `torch.export`, which sees ops that Python code does not show: those
              of scripted functions, C++ code and `torch.func`; about three times slower
``record``    the model runs on data, and the calls it makes are written down; a plan is then
              applied to a copy of the model itself, since other data may take another way
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx, nn

from .errors import FxpruneError, InputError, TraceError
from .inputs import Inputs, candidates, given
from .record import record
from .rules import Rules
from .trace import trace

Frontend = Literal["symbolic", "export", "record"]


@dataclass(frozen=True)
class Traced:
    """A graph, the inputs it was made with, and the way it was made."""

    graph: fx.GraphModule
    inputs: Inputs
    frontend: Frontend


Way = Callable[[nn.Module, Inputs, Rules], fx.GraphModule]


def _symbolic(model: nn.Module, inputs: Inputs, rules: Rules) -> fx.GraphModule:
    return trace(model, inputs.args, inputs.kwargs, rules=rules)


def _export(model: nn.Module, inputs: Inputs, rules: Rules) -> fx.GraphModule:
    from .export import export  # torch.export takes a second to import

    return export(model, inputs.args, inputs.kwargs, rules=rules)


# in the order in which they are tried: each takes more than the one before, and costs more
WAYS: Mapping[str, Way] = {"symbolic": _symbolic, "export": _export, "record": record}


def traced(
    model: nn.Module, example_inputs: Any, rules: Rules, frontend: Frontend | None = None
) -> Traced:
    """The traced graph and its inputs; the usual ones are tried where none are given.

    Without `frontend`, the first way that gives a graph is taken. Raises `InputError` where the
    inputs do not fit, and the first way's `TraceError` where no way gives a graph.
    """
    if example_inputs is not None:
        return _by_some_way(model, given(example_inputs, model), rules, frontend, InputError)
    failures: list[tuple[str, FxpruneError]] = []
    for inputs in candidates(model):
        try:
            return _by_some_way(model, inputs, rules, frontend)
        except InputError as error:
            failures.append((inputs.describe(), error))
    details = [(shape, error.fault) for shape, error in failures[:4]]
    raise InputError(
        f"no usual input fits {type(model).__name__}",
        details=details,
        hint="pass example_inputs=(x,) as forward takes them",
    )


def _by_some_way(
    model: nn.Module,
    inputs: Inputs,
    rules: Rules,
    frontend: Frontend | None,
    also: type[FxpruneError] = TraceError,
) -> Traced:
    """The first way that gives a graph; another is tried after a `TraceError`, or one of `also`:
    what a model does to tensors without data may fail where it runs on real ones."""
    failed: list[tuple[str, FxpruneError]] = []
    for name in WAYS if frontend is None else (frontend,):
        try:
            return Traced(WAYS[name](model, inputs, rules), inputs, name)  # type: ignore[arg-type]
        except FxpruneError as error:
            if not failed and not isinstance(error, (TraceError, also)):
                raise  # no other way takes such a model, or such inputs
            failed.append((name, error))
    if isinstance(failed[-1][1], InputError):
        raise failed[-1][1]  # a run on data is the better witness
    first = failed[0][1]
    first.details += [(name, error.fault) for name, error in failed[1:]]
    raise first
