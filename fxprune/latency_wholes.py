"""What whole networks take, beside what their ops take alone.

A network takes longer than its ops: caches are colder, memory is fresh, calls cost Python's time.
How much longer depends on its size, and not by one factor. So the network is measured as a whole at
each of a few widths, and what lies between is interpolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .analysis import Analysis
from .errors import InputError
from .inputs import random_like
from .latencies import _on
from .rewrite import rewrite
from .timings import Timings
from .widths import RewriteError, Widths

_WHOLE_S = 0.5  # seconds that a network is measured for, and twice
_PASSES = 2


def whole_times(
    analysis: Analysis,
    masks: Sequence[Tensor],
    timings: Timings,
    name: str,
    budget_s: float | None = None,
) -> list[tuple[Tensor, float]]:
    """Masks over ids, and the milliseconds of the network that each leaves; `name` stands for the
    network among the times that are known. Masks of networks that cannot be written or run are left
    out, and all of them where the model has no values. The last mask is that of the network as it
    is; `InputError` where that does not run."""
    if any(tensor.is_meta for tensor in analysis.tensors.values()):
        return []
    names = [f"network {name} with {int(mask.sum())} of {len(mask)} ids" for mask in masks]
    new = [i for i, each in enumerate(names) if each not in timings.known]
    networks = {names[i]: each for i in new for each in _written(analysis, masks[i], timings)}
    inputs = random_like(analysis.inputs, dtype=dtype_of(analysis), device=timings.device)
    share = _WHOLE_S if budget_s is None else budget_s / _PASSES / max(len(networks), 1)
    for _ in range(_PASSES):
        for each, network in networks.items():
            try:
                timings.again(each, network, inputs, min(share, _WHOLE_S))
            except InputError:
                if each == names[-1]:  # the network itself does not run
                    raise
    known = zip(masks, names, strict=True)
    return [(mask, timings.known[each]) for mask, each in known if each in timings.known]


def _written(analysis: Analysis, kept: Tensor, timings: Timings) -> Iterator[nn.Module]:
    if bool(kept.all()):
        yield _on(timings.device, analysis.model)
        return
    widths = Widths(analysis.flow, kept)
    rows = {name: found for name in analysis.flow.ids.slots if (found := widths.kept_of(name))}
    try:
        yield rewrite(analysis.model, analysis.flow, kept, rows).to(timings.device)
    except RewriteError:
        return


def dtype_of(analysis: Analysis) -> torch.dtype | None:
    """That of the first parameter which is no integer."""
    kinds = (p.dtype for p in analysis.model.parameters() if p.is_floating_point())
    return next(kinds, None)
