"""The judge of a pruned network, whoever pruned it: the original with what was removed set to zero.

What a tool removed is given as kept indices, by the original's parameter names and dims. A deep
copy of the original is masked with them and run beside the pruned network, in float64 where that
fits. Normalisations whose weights shrank take statistics over their kept elements. Where the two
differ, both runs are logged, op by op: an op that mixes what was removed into what was kept (a mean
or a softmax over channels, a factor made of a width) has no masked form, and nothing is said.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import zoo_networks
from benchmarks.torchvision_table import zeroed
from benchmarks.zoo_networks import Network, tensors

Kept = Mapping[str, Mapping[int, Any]]
Record = dict[str, Any]
LARGE = 40e6  # parameters; above, the comparison is made in float32
LIMITS = {torch.float64: 1e-7, torch.float32: 1e-4}  # of the largest value of an output
HEARD = 10  # times the limit must another input move the outputs


def compared(network: Network, original: nn.Module, pruned: nn.Module, kept: Kept) -> Record:
    """Whether `pruned` computes what `original` computes without what is not in `kept`: "same",
    "differs", "weak" (outputs hardly depend on the input), or "not compared", and why."""
    large = sum(p.numel() for p in original.parameters()) > LARGE
    first, second = (torch.float32, torch.float64) if large else (torch.float64, torch.float32)
    found = _judged(network, original, pruned, kept, first)
    unsure = large and found["verdict"] == "differs"  # rounding may pass for a difference
    if found["verdict"] != "does not run" and not unsure:
        return found
    again = _judged(network, original, pruned, kept, second)
    if again["verdict"] != "does not run":
        return again
    return found if unsure else {**found, "verdict": "not compared"}


def _judged(
    network: Network, original: nn.Module, pruned: nn.Module, kept: Kept, dtype: torch.dtype
) -> Record:
    try:
        with torch.no_grad():
            return _Trial(network, original, pruned, kept, dtype).judge()
    except (RuntimeError, TypeError, ValueError) as error:  # code that fixes another dtype
        what = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return _verdict("does not run", note=f"does not run in {_name(dtype)}: {what}")


def _verdict(verdict: str, difference: float | None = None, **more: Any) -> Record:
    return {"verdict": verdict, "difference": difference, **more}


@dataclass
class _Trial:
    network: Network
    original: nn.Module
    pruned: nn.Module
    kept: Kept
    dtype: torch.dtype

    def judge(self) -> Record:
        torn = next(_torn(self.original, self.kept), None)
        if torn:
            return _verdict("not compared", note=f"{torn} is shared, and was pruned in two ways")
        narrow = copy.deepcopy(self.pruned).eval().to(self.dtype)
        masked = zeroed(self.original, SimpleNamespace(kept=self.kept)).eval().to(self.dtype)
        norms = Norms(masked, self.kept)
        args = _cast(zoo_networks.others(self.network.args, seed=3), self.dtype)
        with norms:
            expected = self.outputs(masked, args)
        got = self.outputs(narrow, args)
        found = gap(expected, got)
        if found <= LIMITS[self.dtype]:
            return self.agreed(narrow, got, found)
        if not all(bool(each.isfinite().all()) for each in expected):
            return _verdict("not compared", note="the masked original divides by zero")
        return self.differing(masked, narrow, norms, args, found)

    def outputs(self, model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
        """What a network gives; of a detector, what its heads give before anything is chosen."""
        if self.network.kind != "detection":
            return tensors(model(*args))
        with _heard(model) as outputs:
            model(*args)
        return outputs

    def agreed(self, narrow: nn.Module, got: list[Tensor], found: float, note: str = "") -> Record:
        other = _cast(zoo_networks.others(self.network.args, seed=4), self.dtype)
        moved = gap(got, self.outputs(narrow, other))
        heard = moved > HEARD * LIMITS[self.dtype]
        verdict = "same" if heard else "weak"
        return _verdict(verdict, found, dtype=_name(self.dtype), moved=moved, note=note)

    def differing(
        self, masked: nn.Module, narrow: nn.Module, norms: Norms, args: Any, found: float
    ) -> Record:
        """Once more with both runs logged, and attention scaled as the pruned network scales it."""
        with Log() as theirs, Norms(narrow, {}, theirs) as seen:
            got = self.outputs(narrow, args)
        _rescale(masked, self.kept)
        with Log() as log, Norms(masked, self.kept, log, seen.scales):
            expected = self.outputs(masked, args)
        if (again := gap(expected, got)) <= LIMITS[self.dtype]:
            note = "attention is scaled by its new width"
            return self.agreed(narrow, got, again, note)
        why = unmodelled(log.entries, theirs.entries)
        verdict = "not compared" if why else "differs"
        return _verdict(verdict, found, dtype=_name(self.dtype), note=why)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torn(model: nn.Module, kept: Kept) -> Iterator[str]:
    """Shared parameters that were pruned in two ways: the masked original has no such thing."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name and name in kept and kept.get(owner) != kept[name]:
            yield name


def _cast(value: Any, dtype: torch.dtype) -> Any:
    cast = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return pytree.tree_map(cast, value)


def _rescale(model: nn.Module, kept: Kept) -> None:
    """Attention modules divide by the root of a head's width: give masked ones the new width."""
    for name, module in model.named_modules():
        rows = kept.get(f"{name}.in_proj_weight", {}).get(0)
        if not isinstance(module, nn.MultiheadAttention) or rows is None:
            continue
        factor = math.sqrt(3 * module.embed_dim / len(rows))
        module.in_proj_weight[: module.embed_dim] *= factor
        if module.in_proj_bias is not None:
            module.in_proj_bias[: module.embed_dim] *= factor


# -- outputs ---------------------------------------------------------------------------------------

HEADS = ("rpn.head", "head", "roi_heads.box_predictor")


@contextlib.contextmanager
def _heard(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the heads of a detector give."""
    modules = dict(model.named_modules())
    found: list[Tensor] = []
    hear = lambda module, args, output: found.extend(tensors(output))  # noqa: E731
    hooks = [modules[name].register_forward_hook(hear) for name in HEADS if name in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def gap(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference of two lists of outputs, as a share of each one's largest value."""
    if not expected or [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    return max(_gap(a, b) for a, b in zip(expected, got, strict=True))


def _gap(a: Tensor, b: Tensor) -> float:
    if not a.numel():
        return 0.0
    if not a.is_floating_point():
        return float((a != b).any())
    scale = float(a.abs().max()) or 1.0
    found = float((a - b).abs().max()) / scale
    return found if math.isfinite(found) else float("inf")


# -- normalisations over the kept elements ---------------------------------------------------------

NORMS: dict[Callable[..., Any], str] = {
    F.layer_norm: "native_layer_norm",
    F.group_norm: "native_group_norm",
    F.rms_norm: "rms_norm",
}


class Norms(TorchFunctionMode):
    """Runs normalisations over the kept elements of their weights, and tells a log of them and of
    the factors by which attention is scaled. With `scales`, attention is scaled by these."""

    def __init__(
        self, model: nn.Module, kept: Kept, log: Log | None = None, scales: Sequence[float] = ()
    ):
        super().__init__()
        self.keep = {
            id(weight): _line(weight, kept[name])
            for name, weight in model.named_parameters(remove_duplicate=False)
            if name in kept and weight.ndim <= 3
        }
        self.log, self.given, self.scales = log, list(scales), []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func not in NORMS:
            return func(*args, **kwargs)
        x, shape, weight, bias, eps = _norm_arguments(func, *args, **kwargs)
        keep = self.keep.get(id(weight))
        with self._silenced(NORMS[func], None if keep is not None else shape):
            if keep is None:
                return func(*args, **kwargs)
            return _over_kept(func, x, shape, weight, bias, eps, keep)

    def attention(self, q, k, v, *args, **kwargs):
        scale = kwargs.pop("scale", None) or q.shape[-1] ** -0.5
        if self.given and len(self.scales) < len(self.given):
            self.scales.append(scale)
            scale = self.given[len(self.scales) - 1]
        else:
            self.scales.append(scale)
        with self._silenced("attention", [k.shape[-2], v.shape[-2]]):
            return F.scaled_dot_product_attention(q, k, v, *args, scale=scale, **kwargs)

    def _silenced(self, name: str, shape: Any) -> Any:
        return self.log.silenced(name, shape) if self.log else contextlib.nullcontext()


def _line(weight: Tensor, kept: Mapping[int, Any]) -> Tensor:
    """Ones where the elements of a norm's weight are kept."""
    keep = torch.zeros(weight.shape, dtype=weight.dtype)
    index: list[Any] = [torch.arange(n) for n in weight.shape]
    for dim, rows in kept.items():
        index[dim] = torch.tensor(rows).flatten()
    keep[torch.meshgrid(*index, indexing="ij")] = 1
    return keep


def _norm_arguments(func: Any, x: Tensor, shape: Any, *args: Any, **kwargs: Any) -> tuple:
    names = ("weight", "eps") if func is F.rms_norm else ("weight", "bias", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return x, shape, given.get("weight"), given.get("bias"), given.get("eps", 1e-5)


def _over_kept(func, x, shape, weight, bias, eps, keep) -> Tensor:
    if func is F.group_norm:
        return _groups_over_kept(x, shape, weight, bias, eps, keep)
    dims = tuple(range(-keep.ndim, 0))
    count = keep.sum()
    if func is F.rms_norm:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return x * ((x * x * keep).sum(dims, keepdim=True) / count + eps).rsqrt() * weight * keep
    y = _standard(x, keep, dims, count, eps) * weight
    return (y if bias is None else y + bias) * keep


def _groups_over_kept(x, groups, weight, bias, eps, keep) -> Tensor:
    ones = [1] * (x.ndim - 2)
    grouped = x.reshape(len(x), groups, -1, *x.shape[2:])
    part = keep.reshape(1, groups, -1, *ones).expand_as(grouped)
    dims = tuple(range(2, grouped.ndim))
    count = part.sum(dims, keepdim=True).clamp_min(1)
    y = _standard(grouped, part, dims, count, eps).reshape(x.shape)
    line = [1, -1, *ones]
    y = y * weight.view(line)
    return (y if bias is None else y + bias.view(line)) * keep.view(line)


def _standard(x: Tensor, keep: Tensor, dims: tuple[int, ...], count: Tensor, eps: float) -> Tensor:
    centred = (x - (x * keep).sum(dims, keepdim=True) / count) * keep
    return centred / (centred.square().sum(dims, keepdim=True) / count + eps).sqrt()


# -- what the masked original cannot model ---------------------------------------------------------

MIXING = {
    "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "_softmax",
    "_log_softmax", "argmax", "topk", "sort", "cumsum", "prod", "logsumexp", "native_layer_norm",
    "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "rms_norm", "attention",
    "_fused_rms_norm", "batch_norm_elemt", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
}  # fmt: skip
SUMMING = {"sum", "linalg_vector_norm", "norm"}
CONTRACTING = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
SCALING = {"mul", "div", "add", "sub", "rsub", "pow"}


@dataclass(frozen=True)
class Entry:
    """One op of a run: the sizes it runs over, the numbers in its arguments, and how many of the
    elements it sums over are zero throughout."""

    name: str
    sizes: tuple[int, ...] | None = None
    numbers: tuple[float, ...] = ()
    zeros: int = 0


class Log(TorchDispatchMode):
    """The ops of a run over which removed channels could reach kept ones."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.quiet = 0

    @contextlib.contextmanager
    def silenced(self, name: str, sizes: Any) -> Iterator[None]:
        """One entry in place of all that goes on inside."""
        sizes = (sizes,) if isinstance(sizes, int) else sizes
        self.entries.append(Entry(name, None if sizes is None else tuple(sizes)))
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.quiet and (entry := _entry(func, args, kwargs)) is not None:
            self.entries.append(entry)
        return func(*args, **kwargs)


def _entry(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Entry | None:
    name = func.overloadpacket.__name__
    if name in CONTRACTING:
        a, b = args[-2:]
        return Entry(name, (a.shape[-1],), (), _zeros(a, -1, b, -2 if b.ndim > 1 else -1))
    if name in SCALING:
        numbers = tuple(float(a) for a in args if isinstance(a, (int, float)))
        return Entry(name, (), numbers) if numbers else None
    if name in SUMMING:
        dims = _dims(args, kwargs)
        return Entry(name, _sizes(args[0], dims), (), _empty(args[0], dims))
    if name.startswith(("native_batch_norm", "_native_batch_norm", "cudnn_batch_norm")):
        training = any(a is True for a in args)
        return Entry(name, tuple(args[0].shape[2:])) if training else None
    if name not in MIXING:
        return None
    if "pool" in name:
        return Entry(name, tuple(args[0].shape[-2:]))
    return Entry(name, _sizes(args[0], _dims(args, kwargs)))


def _dims(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """The dims an op runs over, as it is told; all, where it is told none."""
    told = kwargs.get("dim", next((a for a in args[1:] if isinstance(a, (int, list, tuple))), None))
    ndim = args[0].ndim
    if told is None or told == []:
        return list(range(ndim))
    return [d % max(ndim, 1) for d in ([told] if isinstance(told, int) else told)]


def _sizes(x: Tensor, dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(x.shape[d] for d in dims if d < x.ndim)


def _empty(x: Tensor, dims: Sequence[int]) -> int:
    """How many places along the dims, taken as one, are zero throughout the others."""
    rest = [d for d in range(x.ndim) if d not in dims]
    gone = x.detach() == 0
    return int((gone.all(dim=rest[0]) if len(rest) == 1 else _all(gone, rest)).sum())


def _all(gone: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in sorted(dims, reverse=True):
        gone = gone.all(dim=dim)
    return gone


def _zeros(a: Tensor, i: int, b: Tensor, j: int) -> int:
    """How many places along a contracted dim are zero throughout one of the operands."""
    left = _all(a.detach() == 0, [d for d in range(a.ndim) if d != i % a.ndim])
    right = _all(b.detach() == 0, [d for d in range(b.ndim) if d != j % b.ndim])
    return int((left | right).sum())


def unmodelled(masked: Sequence[Entry], pruned: Sequence[Entry]) -> str:
    """The first op whose meaning changes with the channels it runs over; nothing if there is none,
    and then a difference has no such excuse."""
    if [e.name for e in masked] != [e.name for e in pruned]:
        return "the two runs are not op for op the same"
    for old, new in zip(masked, pruned, strict=True):
        if old.sizes is None:
            continue  # taken over the kept elements in both
        if old.numbers != new.numbers:
            return f"{old.name} by a number that follows a width"
        if old.sizes == new.sizes:
            continue
        gone = math.prod(old.sizes) - math.prod(new.sizes)
        if old.name in MIXING or old.zeros < gone:
            return f"{old.name} over removed channels"
    return ""
