"""Small networks with one hard idea each, and the oracle they are judged by.

A network is one function and the modules it uses::

    @net(image(), a=conv(3, 8), b=conv(8, 4))
    def gate(m, x):
        return m.b(m.a(x).sigmoid())

The oracle knows nothing of fxprune but `Plan.kept`: it zeroes what was dropped in a deep copy of
the original and runs both.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune

torch.set_num_threads(1)

# -- building --------------------------------------------------------------------------------------


@dataclass
class Case:
    """A network: its forward, the inputs, the modules, and the widths expected at rate 0.5.

    ``half`` gives the length of dim 0 of a layer's weight (or of a parameter); ``mixing`` is what
    `prune` is called with; ``frozen`` is a text that some group's reason must hold.
    """

    forward: Callable
    inputs: tuple
    parts: dict[str, Any]
    half: dict[str, int] = field(default_factory=dict)
    frozen: str = ""
    mixing: str = "norms"
    oracle: str = "masked"

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh network in float64 and eval mode, with random statistics."""
        made = type(self.forward.__name__, (nn.Module,), {"forward": self.forward})()
        for name, part in copy.deepcopy(self.parts).items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                made.register_buffer(name, part)
            else:
                setattr(made, name, part)
        return randomise(made, seed)

    def args(self, seed: int = 0) -> tuple:
        return real(self.inputs, seed)


def net(
    *inputs: Any,
    half: str = "",
    frozen: str = "",
    mixing: str = "norms",
    oracle: str = "",
    into: dict[str, Case] | None = None,
    **parts: Any,
) -> Callable[[Callable], Case]:
    """Make a network of a function and its modules. ``half="a 4"`` gives widths at rate 0.5."""

    def register(forward: Callable) -> Case:
        sizes = {
            name: int(size)
            for name, size in (item.split() for item in half.split(",") if item.strip())
        }
        judge = oracle or ("narrowed" if mixing == "all" else "masked")
        case = Case(forward, inputs, parts, sizes, frozen, mixing, judge)
        if into is not None:
            into[forward.__name__] = case
        return case

    return register


@dataclass(frozen=True)
class Shape:
    """An input to be filled with noise."""

    shape: tuple[int, ...]


def tensor(*shape: int) -> Shape:
    return Shape(shape)


def image(channels: int = 3, side: int = 8) -> Shape:
    return Shape((2, channels, side, side))


def real(value: Any, seed: int = 0) -> Any:
    """The same nest with noise in place of shapes."""
    generator = torch.Generator().manual_seed(seed)

    def fill(item: Any) -> Any:
        if isinstance(item, Shape):
            return torch.randn(item.shape, generator=generator, dtype=torch.float64)
        if isinstance(item, dict):
            return {key: fill(v) for key, v in item.items()}
        if isinstance(item, (tuple, list)):
            return type(item)(fill(v) for v in item)
        return item

    return fill(value)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random running statistics, scales and constants; float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for name, tensor_ in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor_.is_floating_point():
                continue
            noise = torch.rand(tensor_.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor_.copy_(noise + 0.5)
            elif tensor_.ndim < 2 or bool((tensor_ == tensor_.reshape(-1)[0]).all()):
                tensor_.copy_(noise * 2 - 0.7)
            else:
                tensor_.copy_((noise * 2 - 1) * 1.5 / max(tensor_[0].numel(), 1) ** 0.5)
    return model


def conv(i: int, o: int, k: Any = 3, **options: Any) -> nn.Conv2d:
    if "padding" not in options:
        options["padding"] = k // 2
    return nn.Conv2d(i, o, k, **options)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


# -- judging ---------------------------------------------------------------------------------------


def masked(model: nn.Module, kept: Mapping[str, Mapping[int, Any]]) -> nn.Module:
    """A deep copy in which everything that `kept` drops is zero."""
    made = copy.deepcopy(model)
    tensors: dict[str, Tensor] = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    with torch.no_grad():
        for name, dims in kept.items():
            if name.startswith("_tensor_constant"):
                continue  # not in the module; what it meets is zero, or read by nobody
            for dim, rows in dims.items():
                if isinstance(rows[0], list):
                    for part, own in zip(tensors[name].chunk(len(rows), 0), rows, strict=True):
                        _zero(part, dim, own)
                else:
                    _zero(tensors[name], dim, rows)
    _norms_over_kept(made, kept)
    return made


def _zero(part: Tensor, dim: int, keep: list[int]) -> None:
    gone = sorted(set(range(part.shape[dim])) - set(keep))
    if gone:
        part.index_fill_(dim, torch.tensor(gone), TINY)


# not 0: a filter divided by its own norm must not become 0 / 0; squared it still is a number
TINY = 1e-100


class KeptNorm(nn.Module):
    """A normalisation whose statistics run over the kept channels alone."""

    def __init__(self, norm: nn.Module, keep: Mapping[int, list[int]]):
        super().__init__()
        shape = norm.weight.shape
        self.norm, self.keep = norm, torch.ones(shape, dtype=torch.float64)
        for dim, rows in keep.items():
            line = torch.zeros(shape[dim], dtype=torch.float64)
            line[rows] = 1
            self.keep *= line.view([-1 if d == dim else 1 for d in range(len(shape))])

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.GroupNorm):
            grouped = x.reshape(len(x), norm.num_groups, -1, *x.shape[2:])
            keep = self.keep.reshape(1, norm.num_groups, -1, *[1] * (x.ndim - 2)).expand_as(grouped)
            dims = tuple(range(2, grouped.ndim))
            line = [1, -1, *[1] * (x.ndim - 2)]
            y = _standard(grouped, keep, dims, norm.eps).reshape(x.shape)
            return (y * norm.weight.view(line) + norm.bias.view(line)) * self.keep.view(line)
        dims = tuple(range(-self.keep.ndim, 0))
        if isinstance(norm, nn.RMSNorm):
            eps = norm.eps or torch.finfo(x.dtype).eps
            square = (x * x * self.keep).sum(dims, keepdim=True) / self.keep.sum()
            return x * (square + eps).rsqrt() * norm.weight * self.keep
        y = _standard(x, self.keep.expand_as(x), dims, norm.eps) * norm.weight
        return (y if norm.bias is None else y + norm.bias) * self.keep


def _standard(x: Tensor, keep: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    count = keep.sum(dims, keepdim=True).clamp_min(1)
    centred = (x - (x * keep).sum(dims, keepdim=True) / count) * keep
    return centred / (centred.square().sum(dims, keepdim=True) / count + eps).sqrt()


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _norms_over_kept(made: nn.Module, kept: Mapping[str, Mapping[int, Any]]) -> None:
    for name, module in list(made.named_modules()):
        if type(module) in NORMS and f"{name}.weight" in kept:
            owner, _, field_ = name.rpartition(".")
            setattr(made.get_submodule(owner), field_, KeptNorm(module, kept[f"{name}.weight"]))


def narrowed(model: nn.Module, kept: Mapping[str, Mapping[int, Any]]) -> nn.Module:
    """The original's own Python over narrow tensors: what to compare with where statistics run
    over channels."""
    made = copy.deepcopy(model)
    for name, tensor_ in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, field_ = name.rpartition(".")
        module = made.get_submodule(owner)
        for dim, rows in kept.get(name, {}).items():
            tensor_ = tensor_.detach().index_select(dim, torch.tensor(rows))
        new = (
            nn.Parameter(tensor_.detach().clone())
            if field_ in module._parameters
            else tensor_.clone()
        )
        setattr(module, field_, new)
    for module in made.modules():
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == module.in_channels > 1:
            module.groups = module.weight.shape[0] // (module.out_channels // module.in_channels)
    return made


def leaves(value: Any) -> list[Tensor]:
    """The tensors in any nest of containers, dataclasses among them."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [t for f in dataclasses.fields(value) for t in leaves(getattr(value, f.name))]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in leaves(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in leaves(v)]
    return []


def gap(expected: Any, got: Any) -> float:
    """The largest difference of two nests, relative to the largest expected value."""
    worst = 0.0
    for a, b in zip(leaves(expected), leaves(got), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        if a.numel():
            scale = float(a.detach().abs().max()) or 1.0
            worst = max(worst, float((a - b).detach().abs().max()) / scale)
    return worst


def run(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> Any:
    with torch.no_grad():
        return model(*copy.deepcopy(args), **copy.deepcopy(dict(kwargs or {})))


def assert_slices(
    model: nn.Module, pruned: nn.Module, kept: Mapping[str, Mapping[int, Any]]
) -> None:
    """Every tensor of `pruned` is the slice of the original's that `kept` names."""
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, new in {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}.items():
        if name not in old or name.startswith(
            ("_gather_", "_scatter_", "_kept_")
        ):  # constants of the graph
            continue
        dims = kept.get(name, {})
        whole = old[name]
        nested = [rows for rows in dims.values() if isinstance(rows[0], list)]
        if not nested:
            for dim, rows in dims.items():
                whole = whole.index_select(dim, torch.tensor(rows))
            assert torch.equal(whole, new), name
        else:
            assert new.shape[0] == len(dims.get(0, range(whole.shape[0]))), name


def assert_attributes(pruned: nn.Module) -> None:
    """Every linear layer and convolution says of itself what its weight is."""
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Linear):
            said: tuple = (module.out_features, module.in_features)
        elif type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            said = (module.out_channels, module.in_channels // module.groups)
        else:
            continue
        assert said == module.weight.shape[:2], name


def assert_exact(
    model: nn.Module, args: tuple, rate: float = 0.5, kwargs: Mapping[str, Any] | None = None, *,
    others: tuple[tuple, ...] = (), oracle: str = "masked", **options: Any,
) -> Any:  # fmt: skip
    """Prune `model` and prove that the result computes the masked original; give the result.

    `others` are further arguments to compare on (other batch and image sizes). `oracle` is
    "masked", or "narrowed" where statistics run over channels outside of a norm's module.
    """
    before = {k: v.clone() for k, v in model.state_dict().items()}
    example = args if kwargs is None else _bound(model, args, kwargs)
    pruned = fxprune.prune(model, example, criterion="l1", rate=rate, **options)
    plan = pruned.fxprune.plan
    reference = (narrowed if oracle == "narrowed" else masked)(model, plan.kept)
    for arguments in (args, *others):
        expected = run(reference, arguments, kwargs)
        got = run(pruned, arguments, kwargs)
        assert gap(expected, got) < 1e-9, f"differs by {gap(expected, got):.2e}"
    whole = run(model, args, kwargs)
    assert [t.shape for t in leaves(whole)] == [t.shape for t in leaves(run(pruned, args, kwargs))]
    if plan.removed:
        assert gap(whole, expected if not others else run(reference, args, kwargs)) > 1e-6, (
            "dropped nothing that counts"
        )
    assert_slices(model, pruned, plan.kept)
    assert_attributes(pruned)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(v, after[k]) for k, v in before.items()
    )
    return pruned


def _bound(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    import inspect

    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def widths(module: nn.Module) -> dict[str, int]:
    """Length of dim 0 of each layer's weight, and of each parameter that is not in a layer."""
    found = {}
    for name, tensor_ in module.state_dict().items():
        if tensor_.ndim:
            found[name.removesuffix(".weight") if name.endswith(".weight") else name] = (
                tensor_.shape[0]
            )
    return found


def reasons(pruned: Any) -> str:
    """All reasons of a report, in one text."""
    return "\n".join(row.reason for row in pruned.fxprune.report.groups if row.reason)


def source(pruned: Any) -> str:
    """The Python of the pruned network."""
    return pruned.code


# -- odd networks ----------------------------------------------------------------------------------

ODD: dict[str, Case] = {}

# A network's parts stand in one paragraph, not one a line.
# fmt: off


def odd(*inputs: Any, **parts: Any):
    return net(*inputs, into=ODD, **parts)


# einops-like patterns, written with view and permute


@odd(image(), a=conv(3, 8), b=nn.Linear(8 * 4, 6), c=nn.Linear(6, 2), half="a 4, b 3")
def patches(m, x):
    """b c (h p) (w q) -> b (h w) (p q c)"""
    x = m.a(x)
    n, c, h, w = x.shape
    x = (
        x.view(n, c, h // 2, 2, w // 2, 2)
        .permute(0, 2, 4, 3, 5, 1)
        .reshape(n, (h // 2) * (w // 2), -1)
    )
    return m.c(F.relu(m.b(x)))


@odd(
    image(), a=conv(3, 8), b=nn.Linear(8, 12), c=nn.Linear(12, 5), d=conv(5, 2, 1),
    half="a 4, b 6, c 3",
)
def tokens_and_back(m, x):
    x = m.a(x)
    n, c, h, w = x.size()
    t = m.c(F.gelu(m.b(x.flatten(2).transpose(1, 2))))
    return m.d(t.transpose(1, 2).reshape(n, -1, h, w))


@odd(image(), a=conv(3, 16), b=conv(16, 8), c=conv(8, 2), half="a 8, b 4")
def rearranged_groups(m, x):
    """b (g c) h w -> b g c h w, squared, and back"""
    x = m.a(x)
    n, c, h, w = x.shape
    x = x.reshape(n, 4, c // 4, h, w).square().reshape(n, c, h, w)
    return m.c(m.b(x))


@odd(image(), a=conv(3, 8), b=conv(2, 4), c=conv(4, 2), half="a 4, b 2")
def space_to_depth_by_hand(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    x = x.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, h * 2, w * 2)
    return m.c(m.b(x))


@odd(image(), a=conv(3, 8), b=conv(32, 4), c=conv(4, 2), half="a 4, b 2")
def depth_by_hand(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    x = (
        x.view(n, c, h // 2, 2, w // 2, 2)
        .permute(0, 1, 3, 5, 2, 4)
        .contiguous()
        .view(n, c * 4, h // 2, w // 2)
    )
    return m.c(m.b(x))


# local attention, dynamic filters


@odd(
    image(), q=conv(3, 8, 1), k=conv(3, 8, 1), v=conv(3, 6, 1), o=conv(6, 2, 1),
    half="q 4, k 4, v 3",
)
def unfold_attention(m, x):
    q, k, v = m.q(x), m.k(x), m.v(x)
    n, c, h, w = q.shape
    k = F.unfold(k, 3, padding=1).view(n, c, 9, h * w)
    v = F.unfold(v, 3, padding=1).view(n, -1, 9, h * w)
    a = (q.view(n, c, 1, h * w) * k).sum(1, keepdim=True).softmax(2)
    return m.o((a * v).sum(2).view(n, -1, h, w))


@odd(
    image(), a=conv(3, 8), r=conv(8, 6, 1), s=conv(6, 2 * 9, 1), o=conv(8, 2, 1),
    half="a 4, r 3, s 18", frozen="meets a constant",
)
def involution(m, x):
    """Channels go evenly from both blocks; what the kernels hold for positions stays."""
    x = m.a(x)
    n, c, h, w = x.shape
    kernel = m.s(F.relu(m.r(x))).view(n, 2, 9, h, w).unsqueeze(2)
    patches = F.unfold(x, 3, 1, 1).view(n, 2, c // 2, 9, h, w)
    return m.o((kernel * patches).sum(3).view(n, c, h, w))


@odd(
    image(), a=conv(3, 8), w=nn.Parameter(torch.randn(4, 6, 8, 3, 3)), g=nn.Linear(8, 4),
    o=conv(6, 2, 1), half="a 4",
)
def dynamic_conv(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    attention = m.g(x.mean((2, 3))).softmax(1)
    weight = torch.einsum("bk,koixy->boixy", attention, m.w)
    y = F.conv2d(x.reshape(1, n * c, h, w), weight.reshape(n * 6, c, 3, 3), padding=1, groups=n)
    return m.o(y.view(n, 6, h, w))


@odd(
    image(), a=conv(3, 8), b=conv(3, 8, 5), f=nn.Linear(8, 6), g=nn.Linear(6, 16), o=conv(8, 2),
    half="a 4, b 4, f 3, g 8",
)
def selective_kernel(m, x):
    u = torch.stack([m.a(x), m.b(x)], dim=1)
    z = F.relu(m.f(u.sum(1).mean((-1, -2))))
    s = m.g(z).view(-1, 2, u.shape[2], 1, 1).softmax(1)
    return m.o((u * s).sum(dim=1))


@odd(
    image(), a=conv(3, 16, groups=1), b=conv(8, 6, 1), c=conv(6, 16, 1), o=conv(8, 2),
    half="a 8, b 3, c 8",
)
def split_attention(m, x):
    x = m.a(x).relu()
    n, rc = x.shape[:2]
    parts = torch.split(x, rc // 2, dim=1)
    s = m.c(F.relu(m.b(F.adaptive_avg_pool2d(sum(parts), 1))))
    s = s.view(n, 1, 2, -1).transpose(1, 2).softmax(dim=1).reshape(n, -1, 1, 1)
    p, q = torch.split(s, rc // 2, dim=1)
    return m.o(parts[0] * p + parts[1] * q)


@odd(
    image(), hh=conv(3, 8), hl=conv(3, 4), hh2=conv(8, 6), lh2=conv(4, 6), hl2=conv(8, 4),
    ll2=conv(4, 4), o=conv(6, 2), p=conv(4, 2), half="hh 4, hl 2, lh2 3, hh2 3, ll2 2, hl2 2",
)
def octave(m, x):
    def block(pair):
        high, low = pair
        up = F.interpolate(m.lh2(low), scale_factor=2, mode="nearest")
        return m.hh2(high) + up, m.ll2(low) + m.hl2(F.avg_pool2d(high, 2))

    high, low = block((m.hh(x), m.hl(F.avg_pool2d(x, 2))))
    return m.o(high), m.p(low)


@odd(image(), a=conv(3, 8), off=conv(8, 2), o=conv(8, 6), p=conv(6, 2), half="a 4, o 3")
def deformed(m, x):
    x = m.a(x)
    n, _, h, w = x.shape
    ys, xs = torch.meshgrid(
        torch.linspace(-1, 1, h, dtype=x.dtype, device=x.device),
        torch.linspace(-1, 1, w, dtype=x.dtype, device=x.device),
        indexing="ij",
    )
    grid = torch.stack([xs, ys], -1).unsqueeze(0).expand(n, -1, -1, -1)
    grid = grid + m.off(x).tanh().permute(0, 2, 3, 1) * 0.1
    return m.p(m.o(F.grid_sample(x, grid, align_corners=True)).relu())


@odd(image(), a=conv(3, 8), b=conv(10, 6), c=conv(6, 2), half="a 4, b 3")
def coordinates(m, x):
    x = m.a(x)
    n, _, h, w = x.shape
    ys = torch.arange(h, dtype=x.dtype, device=x.device).view(1, 1, h, 1).expand(n, 1, h, w) / (
        h - 1
    )
    xs = torch.arange(w, dtype=x.dtype, device=x.device).view(1, 1, 1, w).expand(n, 1, h, w) / (
        w - 1
    )
    return m.c(m.b(torch.cat([x, xs, ys], 1)))


@odd(image(), a=conv(3, 8), k=conv(8, 9 * 4, 1), z=conv(8, 6, 1), o=conv(6, 2), half="a 4, z 3")
def carafe(m, x):
    x = m.a(x)
    kernel = F.pixel_shuffle(m.k(x), 2).softmax(1)
    x = m.z(x)
    n, c, h, w = x.shape
    patches = F.unfold(x, 3, padding=1).view(n, c * 9, h, w)
    patches = F.interpolate(patches, scale_factor=2, mode="nearest").view(n, c, 9, h * 2, w * 2)
    return m.o((kernel.unsqueeze(1) * patches).sum(2))


@odd(
    image(), a=conv(3, 8), m_=nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (3, 5)),
    o=conv(24, 6, 1), p=conv(6, 2), half="a 4, o 3",
)
def pyramid_pool(m, x):
    x = m.a(x)
    return m.p(m.o(torch.cat([x] + [pool(x) for pool in m.m_], 1)))


@odd(
    image(), a=conv(3, 8), b=conv(8, 4), c=nn.Linear(4 * 21, 6), d=nn.Linear(6, 2),
    half="a 4, b 2, c 3",
)
def spatial_pyramid_vector(m, x):
    x = m.b(m.a(x))
    levels = [F.adaptive_max_pool2d(x, s).view(x.size(0), -1) for s in (1, 2, 4)]
    return m.d(m.c(torch.cat(levels, dim=-1)))


@odd(
    image(), a=conv(3, 8), bs=nn.ModuleList([conv(8, 4, 1), conv(8, 4, 3, dilation=2, padding=2)]),
    g=nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(8, 4, 1)), o=conv(12, 6, 1), p=conv(6, 2),
    half="a 4, o 3, bs.0 2, bs.1 2, g.1 2",
)
def atrous(m, x):
    x = m.a(x)
    found = []
    for branch in m.bs:
        found.append(branch(x))
    found.append(F.interpolate(m.g(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
    return m.p(F.dropout(F.relu(m.o(torch.cat(found, dim=1))), 0.1, m.training))


@odd(
    image(), bs=nn.ModuleList([conv(3, 4, 3), conv(3, 4, 5)]), f=conv(4, 3, 1), g=conv(3, 4, 1),
    o=conv(8, 2), half="f 2, g 2, bs.0 2, bs.1 2",
)
def pyramid_split(m, x):
    feats = torch.stack([b(x) for b in m.bs], 1)
    gates = torch.stack(
        [m.g(F.relu(m.f(feats[:, i].mean((2, 3), keepdim=True)))).sigmoid() for i in range(2)], 1
    )
    out = feats * gates.softmax(dim=1)
    return m.o(out.flatten(1, 2))


@odd(
    image(3, 16), a=conv(3, 6), up=nn.ModuleList(conv(6, 6) for _ in range(3)),
    low=nn.ModuleList(conv(6, 6) for _ in range(3)), o=conv(6, 2),
    half="a 3, up.2 3, up.1 3, up.0 3, low.0 3, low.1 3, low.2 3",
)
def hourglass(m, x):
    def step(level, x):
        up = m.up[level](x)
        low = F.max_pool2d(x, 2)
        low = step(level - 1, low) if level else low
        return up + F.interpolate(m.low[level](low), size=up.shape[2:])

    return m.o(step(2, m.a(x)))


@odd(
    image(), a=conv(3, 4),
    ls=nn.ModuleList(nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), conv(i, 4)) for i in (4, 8, 12)),
    o=conv(16, 2), half="a 2, ls.0.0 2, ls.0.2 2, ls.1.0 4, ls.1.2 2, ls.2.0 6, ls.2.2 2",
)
def dense_list(m, x):
    features = [m.a(x)]
    for layer in m.ls:
        features.append(layer(torch.cat(features, 1)))
    return m.o(torch.cat(features, 1))


@odd(
    image(), w=nn.Parameter(torch.randn(8, 3, 3, 3)), v=nn.Parameter(torch.randn(6, 8, 3, 3)),
    gain=par(6, 1, 1, 1), o=conv(6, 2), mixing="all", half="w 4, v 3, gain 3",
)
def weight_standardised(m, x):
    def standard(w):
        return (w - w.mean((1, 2, 3), keepdim=True)) / (
            w.var((1, 2, 3), keepdim=True) + 1e-5
        ).sqrt()

    return m.o(
        F.conv2d(F.relu(F.conv2d(x, standard(m.w), padding=1)), standard(m.v) * m.gain, padding=1)
    )


@odd(image(), tensor(2, 5), a=conv(3, 8), f=nn.Linear(5, 16), o=conv(8, 2), half="f 8, a 4")
def film(m, x, condition):
    scale, shift = m.f(condition).chunk(2, dim=-1)
    return m.o(m.a(x) * (1 + scale[:, :, None, None]) + shift[..., None, None])


# shapes said in odd ways


@odd(
    image(), a=conv(3, 8), p=nn.AdaptiveAvgPool2d(1), l=nn.Linear(8, 6), k=nn.Linear(6, 2),
    half="a 4, l 3",
)
def squeeze_without_dim(m, x):
    return m.k(m.l(m.p(m.a(x)).squeeze()))


@odd(tensor(1, 3, 8, 8), a=conv(3, 8), l=nn.Linear(8 * 64, 6), k=nn.Linear(6, 2), half="a 4, l 3")
def view_minus_one(m, x):
    return m.k(m.l(m.a(x).view(-1)))


@odd(
    image(), a=conv(3, 8), b=conv(16, 6), l=nn.Linear(6, 5), k=nn.Linear(5, 2),
    half="a 4, b 3, l 3",
)
def negative_dims(m, x):
    x = m.a(x)
    x = torch.cat((x, -x), -3)
    x = m.b(x).mean(-1).mean(dim=-1, keepdim=True).transpose(-1, -2)
    return m.k(m.l(x)).flatten(-2, -1)


@odd(
    image(), a=conv(3, 8), b=conv(12, 6), l=nn.Linear(in_features=6, out_features=5),
    k=nn.Linear(5, 2), half="a 4, b 3, l 3",
)
def keywords_everywhere(m, x):
    x = m.a(input=x)
    p, q = torch.split(tensor=x, split_size_or_sections=4, dim=1)
    x = torch.cat(tensors=[p, torch.add(input=p, other=q), q], dim=1)
    x = F.max_pool2d(input=F.relu(input=m.b(input=x), inplace=False), kernel_size=2)
    x = torch.mean(input=x, dim=(2, 3), keepdim=False)
    return m.k(input=m.l(input=torch.reshape(input=x, shape=(x.size(dim=0), -1))))


@odd(image(), a=conv(3, 8), u=nn.Unflatten(1, (2, 4)), f=nn.Flatten(1, 2), b=conv(8, 2), half="a 4")
def unflatten_module(m, x):
    return m.b(m.f(m.u(m.a(x)).relu()))


@odd(image(), a=conv(3, 8), u=nn.Unflatten(1, (2, 4)), b=conv(4, 2), half="a 4")
def unflatten_and_sum(m, x):
    return m.b(m.u(m.a(x)).sum(1))


@odd(image(), a=conv(3, 8), f=nn.Flatten(2), l=nn.Linear(8, 6), k=nn.Linear(6, 2), half="a 4, l 3")
def flatten_spatial(m, x):
    return m.k(m.l(m.f(m.a(x)).transpose(1, 2)).mean(1))


@odd(
    image(), a=conv(3, 10), b=conv(4, 3), c=conv(4, 3), d=conv(2, 3), o=conv(3, 2),
    half="a 5, b 2, c 2, d 2",
)
def split_by_int(m, x):
    p, q, r = torch.split(m.a(x), 4, 1)
    return m.o(m.b(p) + m.c(q) + m.d(r))


@odd(
    image(), a=conv(3, 10), b=conv(4, 3), c=conv(4, 3), d=conv(2, 3), o=conv(3, 2),
    half="a 5, b 2, c 2, d 2",
)
def chunk_uneven(m, x):
    p, q, r = m.a(x).chunk(3, dim=1)
    return m.o(m.b(p) + m.c(q) + m.d(r))


@odd(
    image(), a=conv(3, 10), b=conv(4, 3), c=conv(3, 3), d=conv(3, 3), o=conv(3, 2),
    half="a 6, b 2, c 2, d 2",
)
def tensor_split_three(m, x):
    p, q, r = torch.tensor_split(m.a(x), 3, dim=1)
    return m.o(m.b(p) + m.c(q) + m.d(r))


@odd(
    image(), a=conv(3, 10), b=conv(2, 3), c=conv(5, 3), d=conv(3, 3), o=conv(3, 2),
    half="a 6, b 2, c 2, d 2",
)
def tensor_split_indices(m, x):
    p, q, r = m.a(x).tensor_split((2, 7), dim=1)
    return m.o(m.b(p) + m.c(q) + m.d(r))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=nn.Linear(6, 2), half="a 4, b 3")
def methods_as_functions(m, x):
    x = torch.Tensor.relu(m.a(x))
    x = torch.Tensor.add(x, torch.Tensor.mul(x, 0.5))
    x = torch.Tensor.mean(m.b(x), (2, 3))
    return m.o(torch.Tensor.view(x, torch.Tensor.size(x, 0), -1))


@odd(image(), a=conv(3, 8), b=conv(12, 6), o=conv(6, 2), half="a 4, b 3")
def new_zeros_padding(m, x):
    x = m.a(x)
    n, _, h, w = x.shape
    return m.o(m.b(torch.cat([x, x.new_zeros(n, 4, h, w)], 1)))


@odd(image(), a=conv(3, 8), b=conv(3, 12), o=conv(12, 2), half="a 4, b 6")
def zero_padded_shortcut(m, x):
    x, y = m.a(x), m.b(x)
    pad = torch.zeros(
        x.size(0), y.size(1) - x.size(1), x.size(2), x.size(3), dtype=x.dtype, device=x.device
    )
    return m.o(y + torch.cat((x, pad), dim=1))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def assigned_border(m, x):
    x = m.a(x)
    x[:, :, 0, :] = 0
    x[..., -1] = 0.0
    return m.o(m.b(x))


@odd(image(), a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), o=conv(12, 2), half="a 4")
def assigned_buffer(m, x):
    x = m.a(x)
    out = x.new_zeros((x.shape[0], 12, x.shape[2], x.shape[3]))
    out[:, :6] = m.b(x[:, :4])
    out[:, 6:] = m.c(x[:, 4:])
    return m.o(out)


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def masked_fills(m, x):
    x = m.a(x)
    return m.o(
        m.b(x.masked_fill(x > 0.5, 0.0)).masked_fill_(torch.zeros(8, 8, dtype=torch.bool), 1.0)
    )


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def wheres(m, x):
    x = m.a(x)
    x = torch.where(x > 0, x, 0.1 * x)
    y = m.b(x)
    return m.o(torch.where(y.abs() < 1, y, torch.zeros_like(y)))


@odd(image(), a=conv(3, 8), b=conv(3, 12), o=conv(12, 2), half="a 4, b 6")
def pad_channels_list(m, x):
    x, y = m.a(x), m.b(x)
    return m.o(F.pad(x, [0, 0, 0, 0, 2, 2], "constant", 0) + y)


@odd(image(), a=conv(3, 8, padding=0), b=conv(8, 6, padding=0), o=conv(6, 2), half="a 4, b 3")
def pads(m, x):
    x = F.pad(m.a(F.pad(x, [1] * 4)), (1, 1, 1, 1), mode="reflect")
    return m.o(F.pad(m.b(x), pad=(0, 1), value=0.0))


# containers and calls


class Twice(nn.Sequential):
    def forward(self, x):
        for module in self:
            x = module(x)
        return x + 1


@odd(image(), s=Twice(conv(3, 8), nn.ReLU(), conv(8, 6)), o=conv(6, 2), half="s.0 4, s.2 3")
def sequential_subclass(m, x):
    return m.o(m.s(x))


@odd(
    image(), s=nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4)),
    o=conv(4, 2), half="s.0 4, s.2 3, s.4 2",
)
def sequential_slices(m, x):
    x = m.s[:2](x)
    for name, child in m.s.named_children():
        if int(name) >= 2:
            x = child(x)
    return m.o(x)


@odd(
    image(), d=nn.ModuleDict({"first": conv(3, 8), "second": conv(8, 6)}), o=conv(6, 2),
    half="d.first 4, d.second 3",
)
def module_dict(m, x):
    for layer in m.d.values():
        x = layer(x).relu()
    return m.o(x)


@odd(image(), conv1=conv(3, 8), conv2=conv(8, 6), conv3=conv(6, 2), half="conv1 4, conv2 3")
def by_name(m, x):
    for i in range(1, 4):
        x = getattr(m, f"conv{i}")(x)
    return x


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def partials(m, x):
    import functools

    act = functools.partial(F.leaky_relu, negative_slope=0.2)
    pool = functools.partial(torch.mean, dim=(2, 3), keepdim=True)
    x = act(m.a(x))
    return m.o(act(m.b(x * pool(x))))


@odd(
    image(), ps=nn.ParameterList([par(8, 1, 1), par(1, 6, 1, 1)]), a=conv(3, 8), b=conv(8, 6),
    o=conv(6, 2), half="a 4, b 3, ps.0 4",
)
def parameter_list(m, x):
    return m.o(m.b(m.a(x) * m.ps[0]) * m.ps[1])


@odd(
    image(), ps=nn.ParameterDict({"s": par(8, 1, 1)}), a=conv(3, 8), o=conv(8, 2),
    half="a 4, ps.s 4",
)
def parameter_dict(m, x):
    return m.o(m.a(x) * m.ps["s"])


@dataclass
class Features:
    deep: Tensor
    skips: list
    note: str = ""


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), p=conv(8, 2), half="a 4, b 3")
def dataclass_output(m, x):
    x = m.a(x)
    return Features(m.o(m.b(x)), [m.p(x)], "both")


class Pair(NamedTuple):
    big: Tensor
    small: Tensor


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), p=conv(8, 2), half="a 4, b 3")
def namedtuple_output(m, x):
    x = m.a(x)
    return Pair(m.p(x), small=m.o(m.b(x)))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), p=conv(8, 2), half="a 4, b 3")
def ordered_output(m, x):
    x = m.a(x)
    found = collections.OrderedDict()
    found["aux"] = m.p(x)
    found["out"] = {"main": [m.o(m.b(x)), (found["aux"],)]}
    return found


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def inner_namedtuple(m, x):
    pair = Pair(m.a(x), x)
    return m.o(m.b(pair.big._replace(pair.big) if hasattr(pair.big, "_replace") else pair.big))


@odd(image(), image(), image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def star_args(m, *xs):
    return m.o(m.b(sum(m.a(x) for x in xs)))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def defaults(m, x, scale=2.0, skip=None, *, act=F.relu):
    x = act(m.a(x)) * scale
    return m.o(m.b(x if skip is None else x + skip))


@odd(
    [image(), (image(), {"more": image()})], a=conv(3, 8), b=conv(8, 6), o=conv(6, 2),
    half="a 4, b 3",
)
def nested_inputs(m, xs):
    first, (second, rest) = xs
    return m.o(m.b(m.a(first) + m.a(second) * m.a(rest["more"])))


@odd(
    {"left": image(), "right": image()}, a=conv(3, 8), b=conv(16, 6), o=conv(6, 2), half="a 4, b 3",
)
def dict_input(m, batch):
    return m.o(m.b(torch.cat([m.a(batch["left"]), m.a(batch["right"])], 1)))


# numbers of another kind


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def fourier(m, x):
    x = m.a(x)
    return m.o(m.b(torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[-2:])))


@odd(
    image(), a=conv(3, 8), f=nn.Parameter(torch.randn(8, 8, 5, 2)), b=conv(8, 6), o=conv(6, 2),
    half="b 3",
)
def global_filter(m, x):
    x = m.a(x)
    spectrum = torch.fft.rfft2(x, dim=(2, 3), norm="ortho") * torch.view_as_complex(m.f)
    return m.o(m.b(torch.fft.irfft2(spectrum, s=(8, 8), dim=(2, 3), norm="ortho")))


@odd(image(), a=conv(3, 6), re=conv(6, 8), im=conv(6, 8), o=conv(8, 2), half="a 3")
def complex_parts(m, x):
    x = m.a(x)
    z = torch.complex(m.re(x), m.im(x))
    return m.o(z.abs()), m.o((z * z.conj()).real)


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def casts(m, x):
    x = m.a(x)
    return m.o(m.b(x.float().to(x.dtype).type_as(x) + (x > 0).to(x.dtype)))


# gates of all sorts


@odd(
    image(), a=conv(3, 8), g=par(1, 8, 1, 1), b=par(1, 8, 1, 1), o=conv(8, 2), mixing="all",
    half="a 4",
)
def global_response(m, x):
    """GRN of ConvNeXt V2: divided by the mean over channels"""
    x = m.a(x)
    gx = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    nx = gx / (gx.mean(dim=1, keepdim=True) + 1e-6)
    return m.o(m.g * (x * nx) + m.b + x)


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 4")
def simam(m, x):
    x = m.a(x)
    n = x.shape[2] * x.shape[3] - 1
    d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
    v = d.sum(dim=[2, 3], keepdim=True) / n
    return m.o(x * torch.sigmoid(d / (4 * (v + 1e-4)) + 0.5))


@odd(image(), a=conv(3, 8), filt=torch.ones(1, 1, 3, 3), b=conv(8, 6), o=conv(6, 2), half="b 3")
def blur_expanded(m, x):
    x = m.a(x)
    c = x.shape[1]
    return m.o(
        m.b(
            F.conv2d(
                F.pad(x, (1, 1, 1, 1), "reflect"), m.filt.expand(c, 1, 3, 3), stride=2, groups=c
            )
        )
    )


@odd(
    image(), a=conv(3, 8), filt=torch.randn(8, 1, 3, 3), b=conv(8, 6), o=conv(6, 2),
    half="filt 4, a 4, b 3",
)
def blur_buffer(m, x):
    return m.o(m.b(F.conv2d(m.a(x), m.filt, stride=2, padding=1, groups=8)))


@odd(
    image(), a=conv(3, 8), d=conv(8, 8, groups=8), b=conv(16, 6), o=conv(6, 2),
    half="a 4, d 4, b 3",
)
def ghost(m, x):
    x = m.a(x)
    return m.o(m.b(torch.cat([x, m.d(x)], dim=1)))


@odd(
    image(), a=conv(3, 8), d=conv(8, 8, groups=8), b=conv(12, 6), o=conv(6, 2),
    half="a 4, d 4, b 3",
)
def ghost_cut(m, x):
    x = m.a(x)
    return m.o(m.b(torch.cat([x, m.d(x)], dim=1)[:, :12, :, :]))


@odd(
    image(), a=conv(3, 12), cs=nn.ModuleList(conv(3, 3) for _ in range(3)), b=conv(12, 6),
    o=conv(6, 2), half="a 8, b 3, cs.0 2, cs.1 2, cs.2 2",
)
def res2net(m, x):
    parts = torch.split(m.a(x), 3, 1)
    found, last = [], 0
    for i, layer in enumerate(m.cs):
        last = layer(parts[i] if i == 0 else last + parts[i])
        found.append(last)
    return m.o(m.b(torch.cat([*found, parts[3]], 1)))


@odd(
    image(), a=conv(3, 8), c=conv(8, 6, 1), bn=nn.BatchNorm2d(6), h=conv(6, 8, 1), w=conv(6, 8, 1),
    o=conv(8, 2), half="a 4, c 3, bn 3, h 4, w 4",
)
def coordinate_attention(m, x):
    x = m.a(x)
    _, _, h, w = x.size()
    y = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)], dim=2)
    ys, xs = torch.split(F.hardswish(m.bn(m.c(y))), [h, w], dim=2)
    return m.o(x * m.h(ys).sigmoid() * m.w(xs.permute(0, 1, 3, 2)).sigmoid())


@odd(image(), a=conv(3, 8), f=conv(8, 8, 1), o=conv(8, 2), half="a 4, f 4")
def effective_se(m, x):
    x = m.a(x)
    return m.o(x * F.relu6(m.f(x.mean((2, 3), keepdim=True)) + 3) / 6)


@odd(
    image(), s=conv(3, 6), a=conv(6, 8), e=nn.Conv1d(1, 1, 3, padding=1, bias=False), o=conv(8, 2),
    half="s 3, a 4",
)
def eca(m, x):
    x = m.a(m.s(x))
    y = m.e(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
    return m.o(x * y.sigmoid()[:, :, None, None])


@odd(
    image(), a=conv(3, 8), cs=nn.ModuleList([conv(4, 4, 3, groups=4), conv(4, 4, 5, groups=4)]),
    b=conv(8, 6), o=conv(6, 2), half="a 4, b 3, cs.0 2, cs.1 2",
)
def mixed_depthwise(m, x):
    parts = torch.split(m.a(x), [4, 4], 1)
    return m.o(m.b(torch.cat([c(p) for c, p in zip(m.cs, parts, strict=True)], 1)))


@odd(
    image(), s=conv(3, 6), a=conv(6, 8), g=conv(2, 1, 3, bias=False), o=conv(8, 2),
    half="s 3, a 4",
)
def triplet(m, x):
    """one arm of triplet attention: C and H trade places, pooled over H"""
    x = m.a(m.s(x))
    y = x.permute(0, 2, 1, 3).contiguous()
    pooled = torch.cat((y.max(1)[0].unsqueeze(1), y.mean(1).unsqueeze(1)), 1)
    gate = m.g(pooled).sigmoid()
    return m.o((y * gate).permute(0, 2, 1, 3).contiguous())


@odd(image(), a=conv(3, 8), bn=nn.BatchNorm2d(8), o=conv(8, 2), mixing="all", half="a 4, bn 4")
def norm_gate(m, x):
    """NAM: the share of each gamma gates its channel"""
    x = m.a(x)
    y = m.bn(x)
    share = m.bn.weight.abs() / m.bn.weight.abs().sum()
    y = y.permute(0, 2, 3, 1).mul(share).permute(0, 3, 1, 2)
    return m.o(x * y.sigmoid())


@odd(
    image(), a=nn.ModuleList([nn.Sequential(conv(3, 8, k), nn.BatchNorm2d(8)) for k in (1, 3)]),
    id=nn.BatchNorm2d(3),
    b=nn.ModuleList([nn.Sequential(conv(8, 8, k), nn.BatchNorm2d(8)) for k in (1, 3)]),
    bid=nn.BatchNorm2d(8), o=conv(8, 2),
    half="bid 4, a.0.0 4, a.0.1 4, a.1.0 4, a.1.1 4, b.0.0 4, b.0.1 4, b.1.0 4, b.1.1 4",
)
def rep_branches(m, x):
    x = F.relu(sum(branch(x) for branch in m.a))
    return m.o(F.relu(m.bid(x) + sum(branch(x) for branch in m.b)))


@odd(
    image(), a=conv(3, 8, (1, 3), padding=(0, 1)), b=conv(3, 8, (3, 1), padding=(1, 0)),
    c=conv(3, 8), o=conv(8, 2), half="a 4, b 4, c 4",
)
def asymmetric(m, x):
    return m.o(m.a(x) + m.b(x) + m.c(x))


@odd(image(), a=conv(3, 8), b=conv(4, 4), c=conv(8, 6), o=conv(6, 2), half="a 4, b 2, c 3")
def half_slices(m, x):
    x = m.a(x)
    keep, work = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    return m.o(m.c(torch.cat([keep, m.b(work)], 1)))


@odd(image(), a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), o=conv(6, 2), half="a 4, b 3, c 3")
def strided_slices(m, x):
    x = m.a(x)
    return m.o(m.b(x[:, ::2]) + m.c(x[:, 1::2]))


@odd(image(), a=conv(3, 8), b=conv(4, 6), o=conv(6, 2), mixing="all", half="a 4, b 3")
def maxout(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o(m.b(x.view(n, c // 2, 2, h, w).max(dim=2)[0]))


@odd(image(), a=conv(3, 8), b=conv(16, 6), o=conv(6, 2), half="a 4, b 3")
def crelu(m, x):
    x = m.a(x)
    return m.o(m.b(torch.cat((F.relu(x), F.relu(-x)), 1)))


@odd(
    image(), a=conv(3, 8), d=conv(8, 8, groups=8), bn=nn.BatchNorm2d(8), o=conv(8, 2),
    half="a 4, d 4, bn 4",
)
def frelu(m, x):
    x = m.a(x)
    return m.o(torch.max(x, m.bn(m.d(x))))


@odd(
    image(), a=conv(3, 8), f=nn.Linear(8, 6), g=nn.Linear(6, 4),
    lam=torch.tensor([1.0, 1.0, 0.5, 0.5]), base=torch.tensor([1.0, 0.0, 0.0, 0.0]), o=conv(8, 2),
    half="a 4, f 3",
)
def dynamic_relu(m, x):
    x = m.a(x)
    theta = 2 * m.g(F.relu(m.f(x.mean(-1).mean(-1)))).sigmoid() - 1
    coefs = theta.view(-1, 4) * m.lam + m.base
    y = x.permute(1, 2, 3, 0).unsqueeze(-1) * coefs[:, :2] + coefs[:, 2:]
    return m.o(torch.max(y, dim=-1)[0].permute(3, 0, 1, 2))


@odd(image(), a=conv(12, 8), o=conv(8, 2), half="a 4")
def focus(m, x):
    x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
    return m.o(m.a(x))


@odd(image(), a=conv(3, 8), b=conv(32, 6), o=conv(6, 2), half="a 4, b 3")
def focus_inside(m, x):
    x = m.a(x)
    x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
    return m.o(m.b(x))


@odd(image(), a=conv(3, 8), b=conv(3, 8, stride=2), w=par(2), o=conv(8, 2), half="a 4, b 4")
def weighted_fusion(m, x):
    p, q = m.a(x), m.b(x)
    w = F.relu(m.w)
    w = w / (w.sum(dim=0) + 1e-4)
    return m.o(F.silu(w[0] * p + w[1] * F.interpolate(q, scale_factor=2.0)))


@odd(
    image(), a=torch.nn.utils.parametrizations.weight_norm(conv(3, 8)), b=conv(8, 6), o=conv(6, 2),
    half="b 3, a.parametrizations.weight.original1 4, a.parametrizations.weight.original0 4",
)
def weight_normed(m, x):
    return m.o(m.b(m.a(x)))


@odd(
    image(), a=conv(3, 8), b=torch.nn.utils.parametrizations.spectral_norm(conv(8, 6)),
    o=conv(6, 2),
    half="a 4, b.parametrizations.weight.original 3, b.parametrizations.weight.0._u 3",
)
def spectral_normed(m, x):
    return m.o(m.b(m.a(x)))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)


@odd(image(), a=conv(3, 8), n=LayerNorm2d(8), o=conv(8, 2), oracle="narrowed", half="a 4, n 4")
def layer_norm_2d(m, x):
    return m.o(m.n(m.a(x)))


@odd(image(), a=conv(3, 8), w=par(8), b=par(8), o=conv(8, 2), mixing="all", half="w 4, b 4, a 4")
def layer_norm_by_hand(m, x):
    x = m.a(x)
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    x = (x - u) / torch.sqrt(s + 1e-6)
    return m.o(m.w[:, None, None] * x + m.b[:, None, None])


@odd(image(), a=conv(3, 8), n=nn.LayerNorm((8, 8, 8)), o=conv(8, 2), half="a 4, n 4")
def layer_norm_whole(m, x):
    return m.o(m.n(m.a(x)))


@odd(
    image(), a=conv(3, 8), d=conv(8, 8, 7, groups=8), n=nn.LayerNorm(8), p=nn.Linear(8, 16),
    q=nn.Linear(16, 8), g=par(8), o=conv(8, 2), half="g 4, a 4, d 4, n 4, p 8, q 4",
)
def convnext(m, x):
    x = m.a(x)
    y = m.n(m.d(x).permute(0, 2, 3, 1))
    y = (m.g * m.q(F.gelu(m.p(y)))).permute(0, 3, 1, 2)
    return m.o(x + y)


@odd(
    tensor(2, 5, 6), p=nn.Linear(6, 16), n=nn.LayerNorm(8), s=nn.Linear(5, 5), q=nn.Linear(8, 6),
    o=nn.Linear(6, 2), half="p 8, n 4",
)
def gmlp(m, x):
    u, v = F.gelu(m.p(x)).chunk(2, dim=-1)
    v = m.s(m.n(v).transpose(-1, -2)).transpose(-1, -2)
    return m.o(x + m.q(u * v))


@odd(
    tensor(2, 5, 6), e=nn.Linear(6, 8), t1=nn.Linear(5, 10), t2=nn.Linear(10, 5),
    c1=nn.Linear(8, 12), c2=nn.Linear(12, 8), n=nn.LayerNorm(8), o=nn.Linear(8, 2),
    half="e 4, n 4, t1 5, c1 6, c2 4",
)
def mixer(m, x):
    x = m.e(x)
    x = x + m.t2(F.gelu(m.t1(m.n(x).transpose(1, 2)))).transpose(1, 2)
    x = x + m.c2(F.gelu(m.c1(x)))
    return m.o(x.mean(dim=1))


@odd(
    image(), q=conv(3, 8, 1), k=conv(3, 8, 1), v=conv(3, 6, 1), o=conv(6, 2, 1), mixing="all",
    half="q 4, k 4, v 3",
)
def efficient_attention(m, x):
    n, _, h, w = x.shape
    q, k, v = m.q(x).flatten(2).softmax(dim=1), m.k(x).flatten(2).softmax(dim=2), m.v(x).flatten(2)
    context = k @ v.transpose(1, 2)
    return m.o((context.transpose(1, 2) @ q).reshape(n, -1, h, w))


@odd(
    tensor(2, 5, 6), qkv=nn.Linear(6, 36), p=nn.Linear(12, 6), o=nn.Linear(6, 2),
    half="qkv 18, p 3",
)
def heads(m, x):
    n, l, _ = x.shape
    q, k, v = m.qkv(x).reshape(n, l, 3, 3, 4).permute(2, 0, 3, 1, 4)
    a = (q @ k.transpose(-2, -1) * 4**-0.5).softmax(dim=-1)
    return m.o(m.p((a @ v).transpose(1, 2).reshape(n, l, 12)))


@odd(
    tensor(2, 5, 6), qkv=nn.Linear(6, 36), p=nn.Linear(12, 6), o=nn.Linear(6, 2),
    half="qkv 18, p 3",
)
def heads_unbound(m, x):
    n, l, _ = x.shape
    q, k, v = m.qkv(x).view(n, l, 3, 3, -1).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v)
    return m.o(m.p(y.transpose(1, 2).flatten(2)))


# weights used in odd ways


@odd(
    tensor(2, 6), w=nn.Parameter(torch.randn(8, 6)), v=nn.Parameter(torch.randn(8, 5)),
    o=nn.Linear(5, 2), half="w 4, v 4",
)
def transposed_weights(m, x):
    return m.o(F.linear(x, m.w).relu() @ m.v)


@odd(tensor(2, 6), w=nn.Parameter(torch.randn(8, 6)), o=nn.Linear(6, 2), half="w 4")
def tied_autoencoder(m, x):
    h = F.relu(F.linear(x, m.w))
    return m.o(F.linear(h, m.w.t()))


@odd(tensor(2, 6), w=nn.Parameter(torch.randn(6, 8)), b=par(8), o=nn.Linear(8, 2), half="b 4")
def addmm_layer(m, x):
    return m.o(torch.addmm(m.b, x, m.w).relu())


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8)), o=conv(6, 2), half="w 3, a 4")
def conv_as_matmul(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o((m.w @ x.view(n, c, h * w)).view(n, 6, h, w))


@odd(
    image(), a=conv(3, 8), b=nn.BatchNorm2d(8), c=nn.BatchNorm2d(8), o=conv(8, 2),
    half="a 4, b 4, c 4",
)
def shared_conv_own_norms(m, x):
    return m.o(F.relu(m.b(m.a(x))) + F.relu(m.c(m.a(x.flip(-1)))))


@odd(
    image(), a=conv(3, 8), w=par(8), b=par(8), mean=torch.zeros(8), var=torch.ones(8), o=conv(8, 2),
    half="w 4, b 4, var 4, mean 4, a 4",
)
def functional_batch_norm(m, x):
    return m.o(F.batch_norm(m.a(x), m.mean, m.var + 1.0, m.w, m.b, training=False))


@odd(
    image(), a=conv(3, 8), w=par(8), b=par(8), mean=torch.zeros(8), var=torch.rand(8), o=conv(8, 2),
    half="w 4, b 4, var 4, mean 4, a 4",
)
def frozen_batch_norm(m, x):
    scale = m.w.view(1, -1, 1, 1) * (m.var.view(1, -1, 1, 1).abs() + 1e-5).rsqrt()
    bias = m.b.view(1, -1, 1, 1) - m.mean.view(1, -1, 1, 1) * scale
    return m.o(m.a(x) * scale + bias)


@odd(
    image(), mean=torch.rand(1, 3, 1, 1), std=torch.rand(3, 1, 1), a=conv(3, 8), o=conv(8, 2),
    half="a 4",
)
def normalised_input(m, x):
    return m.o(m.a((x - m.mean) / m.std.abs()))


@odd(image(), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), o=conv(8, 2), half="a 4, b 4, c 4")
def in_place(m, x):
    x = m.a(x)
    y = m.b(F.relu(x, inplace=True))
    y += x
    y.mul_(0.5).clamp_(0, 6)
    z = m.c(y)
    z.add_(y, alpha=2)
    z.relu_()
    return m.o(z)


@odd(image(), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2), half="a 4, b 4")
def odd_sums(m, x):
    x, y = m.a(x), m.b(x)
    z = torch.add(x, y, alpha=2) - torch.lerp(x, y, 0.3)
    z = torch.addcmul(z, x, y, value=0.5) + torch.rsub(x, y) + (1 - y) + 3 / (x.abs() + 1)
    return m.o(torch.maximum(z, x).minimum(y) ** 2)


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 4")
def hard_swish_by_hand(m, x):
    x = m.a(x)
    return m.o(x * F.relu6(x + 3.0, inplace=True) / 6.0)


@odd(
    image(), a=conv(3, 8), g=par(8, 1, 1), b=conv(8, 6, padding=1), o=conv(6, 2),
    half="g 4, a 4, b 3",
)
def bias_after(m, x):
    """a constant added before a padded convolution: the border sees zeros"""
    return m.o(m.b(F.relu(m.a(x) + m.g)))


@odd(image(), a=conv(3, 8), n=nn.LocalResponseNorm(3), o=conv(8, 2), mixing="all", half="a 4")
def local_response(m, x):
    return m.o(m.n(m.a(x)))


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 4")
def functional_norms(m, x):
    x = F.instance_norm(m.a(x))
    return m.o(x)


@odd(
    image(), a=conv(3, 8, padding_mode="circular"), b=conv(8, 6, padding_mode="reflect"),
    o=conv(6, 2), half="a 4, b 3",
)
def padding_modes(m, x):
    return m.o(m.b(m.a(x)))


class Scaled(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(
            x, self.weight * 0.5, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Plain(nn.Conv2d):
    """adds nothing"""


@odd(
    image(), a=Scaled(3, 8, 3, padding=1), b=Plain(8, 6, 3), c=Scaled(6, 6, 3, groups=6),
    o=conv(6, 2), half="b 3, a 4, c 3",
)
def conv_subclasses(m, x):
    return m.o(m.c(m.b(m.a(x))))


@odd(
    image(), a=conv(3, 8), n=nn.BatchNorm2d(8, affine=False), b=conv(8, 6),
    k=nn.BatchNorm2d(6, track_running_stats=False), o=conv(6, 2), half="a 4, b 3, k 3",
)
def bare_norms(m, x):
    return m.o(m.k(m.b(m.n(m.a(x)))))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def python_all_over(m, x):
    assert x.dim() == 4 and len(x) > 0, f"bad {x.shape}"
    try:
        y = m.a(x)
    except ValueError:
        return x
    if torch.jit.is_scripting() or not isinstance(y, Tensor):
        raise TypeError("no")
    with torch.no_grad():
        y = F.relu(y)
    for _ in range(y.shape[1] // 4):
        y = y * 0.9
    return m.o(m.b(y[:] if y.ndim == 4 else y))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def checkpointed(m, x):
    from torch.utils.checkpoint import checkpoint

    return m.o(checkpoint(lambda t: m.b(F.relu(t)), m.a(x), use_reentrant=False))


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * s * (1 + x * (1 - s))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def own_autograd(m, x):
    return m.o(m.b(Swish.apply(m.a(x))))


@odd(image(), a=conv(3, 8), b=conv(8, 6), c=conv(6, 5), o=conv(5, 2), half="a 4, b 3, c 3")
def dead_code(m, x):
    y = m.a(x)
    unused = m.c(m.b(y)) * 2  # noqa: F841
    return m.o(m.c(m.b(y)))


@odd(image(), a=conv(3, 8), b=conv(8, 8), o=conv(8, 2), half="a 4, b 4")
def stochastic_depth(m, x):
    x = m.a(x)
    if m.training and torch.rand(1).item() < 0.5:
        return m.o(x)
    return m.o(x + m.b(x))


@odd(image(), a=conv(3, 8), g=nn.Linear(8, 8), o=nn.Linear(8, 2), half="a 4, g 4")
def gathered_position(m, x):
    x = m.a(x).flatten(2).transpose(1, 2)
    return m.o(m.g(x)[:, 0])


@odd(
    tensor(2, 5, 6), e=nn.Linear(6, 8), cls=nn.Parameter(torch.randn(1, 1, 8)),
    pos=nn.Parameter(torch.randn(1, 6, 8)), p=nn.Linear(8, 8), o=nn.Linear(8, 2), half="e 4, p 4",
)
def class_token(m, x):
    x = m.e(x)
    x = torch.cat([m.cls.expand(x.shape[0], -1, -1), x], dim=1) + m.pos
    return m.o((x + m.p(x))[:, 0])


@odd(image(), ws=nn.ModuleList([conv(3, 8), conv(8, 4)]), o=conv(8, 2), half="ws.0 4, ws.1 2")
def cat_of_stack(m, x):
    y = m.ws[1](m.ws[0](x))
    return m.o(torch.stack((y, y * 2), dim=2).flatten(1, 2))


@odd(image(), a=conv(3, 8), b=conv(16, 6), o=conv(6, 2), half="b 3")
def repeats(m, x):
    x = m.a(x)
    return m.o(
        m.b(x.repeat(1, 2, 1, 1))
        + m.b(x.repeat_interleave(2, dim=1))
        + m.b(torch.tile(x, (1, 2, 1, 1)))
    )


@odd(
    image(), a=conv(3, 8), idx=torch.tensor([7, 1, 3, 0, 2]), b=conv(5, 6), o=conv(6, 2),
    half="a 5, b 3",
)
def index_buffer(m, x):
    x = m.a(x)
    return m.o(m.b(x[:, m.idx]) + m.b(torch.index_select(x, 1, m.idx)))


@odd(image(), a=conv(3, 8), b=conv(3, 6), o=conv(6, 2), half="a 4, b 3")
def index_lists(m, x):
    x, y = m.a(x), m.b(x)
    return m.o(x[:, [0, 2, 3, 5, 6, 7]] + y[:, torch.arange(5, -1, -1)])


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 4")
def rolled(m, x):
    x = m.a(x)
    return m.o(torch.roll(x, shifts=(1, -1), dims=(2, 3)) + torch.roll(x, 2, 1))


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 4")
def cumulative(m, x):
    return m.o(m.a(x).cumsum(2))


@odd(image(), a=conv(3, 8), b=conv(3, 4), o=conv(4, 2), half="a 4, b 2")
def folded(m, x):
    n, _, h, w = x.shape
    y = F.fold(m.a(x).flatten(2).repeat(1, 2, 1)[:, :16], (h * 2, w * 2), 2, stride=2)
    return m.o(F.avg_pool2d(y, 2) + m.b(x))


@odd(
    tensor(2, 4, 5), tensor(2, 8), e=nn.Linear(5, 6), gates=nn.Linear(14, 32), o=nn.Linear(8, 2),
    frozen="meets a constant or an input", half="e 3",
)
def lstm_cell_by_hand(m, xs, h):
    """the hidden state is an input of the network: its width stays"""
    c = torch.zeros_like(h)
    for x in m.e(xs).unbind(1):
        i, f, g, o = m.gates(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return m.o(h)


@odd(image(), x2h=conv(3, 8), cell=conv(16, 32), o=conv(8, 2), half="x2h 4, cell 16")
def conv_lstm(m, x):
    h = torch.zeros(x.size(0), 8, x.size(2), x.size(3), dtype=x.dtype)
    c = h
    for _ in range(2):
        i, f, o, g = torch.chunk(m.cell(torch.cat((m.x2h(x), h), dim=1)), 4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return m.o(h)


@odd(image(), image(), a=conv(3, 8), p=nn.Linear(8, 6), o=nn.Linear(6, 4), half="a 4, p 3, o 2")
def siamese(m, x, y):
    def embed(t):
        return m.o(F.relu(m.p(m.a(t).mean((2, 3)))))

    return F.cosine_similarity(embed(x), embed(y))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def same_output_twice(m, x):
    y = m.o(m.b(m.a(x)))
    return y, y, [y]


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), frozen="output", half="b 3")
def inner_output(m, x):
    x = m.a(x)
    return {"features": x, "logits": m.o(m.b(x))}


@odd(image(), a=conv(3, 8), v=nn.Linear(8, 12), o=nn.Linear(12, 2), half="v 6")
def vlad(m, x):
    """NetVLAD: soft assignment of pixels to centres"""
    x = m.a(x).flatten(2)
    soft = x.mean(1, keepdim=True).softmax(-1)
    return m.o(m.v((x * soft).sum(-1)))


@odd(image(), s=conv(3, 6), a=conv(6, 8), o=nn.Linear(36, 2), half="s 3, a 8")
def bilinear_pool(m, x):
    """upper triangle of the Gram matrix: no channel may go"""
    x = m.a(m.s(x)).flatten(2)
    gram = x @ x.transpose(1, 2)
    rows, cols = torch.triu_indices(8, 8)
    return m.o(gram[:, rows, cols])


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=nn.Linear(6, 2), half="a 4, b 3")
def generalised_mean(m, x):
    x = m.b(m.a(x).relu()).clamp(min=1e-6).pow(3)
    return m.o(F.avg_pool2d(x, (x.size(-2), x.size(-1))).pow(1 / 3).flatten(1))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="b 3")
def shifted(m, x):
    """TSM-like: a quarter of the channels move one pixel"""
    x = m.a(x)
    fold = x.shape[1] // 4
    out = torch.zeros_like(x)
    out[:, :fold, :-1] = x[:, :fold, 1:]
    out[:, fold : 2 * fold, 1:] = x[:, fold : 2 * fold, :-1]
    out[:, 2 * fold :] = x[:, 2 * fold :]
    return m.o(m.b(out))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def shift_by_pieces(m, x):
    p, q, r = m.a(x).split((2, 2, 4), dim=1)
    p = F.pad(p, (0, 0, 0, 1))[:, :, 1:]
    return m.o(m.b(torch.cat([p, q.roll(1, -1), r], 1)))


@odd(image(), a=nn.Conv2d(3, 8, 3), t=nn.ConvTranspose2d(8, 6, 3), o=conv(6, 2), half="a 4, t 4")
def transpose_with_size(m, x):
    return m.o(m.t(m.a(x), output_size=x.shape[2:]))


@odd(
    image(), a=conv(3, 8), p=nn.MaxPool2d(2, return_indices=True), u=nn.MaxUnpool2d(2),
    o=conv(8, 2), half="a 4",
)
def unpooled(m, x):
    y, where = m.p(m.a(x))
    return m.o(m.u(y, where))


@odd(
    tensor(2, 3, 4, 8, 8), a=nn.Conv3d(3, 8, 3, padding=1), b=nn.Conv2d(8, 6, 3),
    o=nn.Conv2d(6, 2, 1), half="a 4, b 3",
)
def frames(m, x):
    x = m.a(x)
    n, c, t, h, w = x.shape
    y = m.b(x.transpose(1, 2).reshape(n * t, c, h, w))
    return m.o(y).view(n, t, 2, *y.shape[-2:])


@odd(
    tensor(2, 3, 32), a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 6, 3, dilation=2),
    l=nn.GRU(6, 5, batch_first=True), o=nn.Linear(5, 2), half="a 4, b 3",
)
def sound(m, x):
    y, _ = m.l(m.b(F.relu(m.a(x))).transpose(1, 2))
    return m.o(y[:, -1])


@odd(
    tensor(2, 3, 32), a=nn.Conv1d(3, 16, 3), b=nn.Conv1d(8, 6, 1), o=nn.Conv1d(6, 2, 1),
    half="a 8, b 3",
)
def gated_wavenet(m, x):
    x = m.a(x)
    t, s = x[:, :8], x[:, 8:]
    return m.o(m.b(t.tanh() * s.sigmoid()))


@odd(
    torch.tensor([[1, 2, 3], [4, 5, 6]]), e=nn.Embedding(10, 8), c=nn.Conv1d(8, 6, 2),
    o=nn.Linear(6, 2), half="c 3",
)
def words(m, ids):
    return m.o(m.c(m.e(ids).transpose(1, 2)).max(dim=2).values)


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def numel_and_friends(m, x):
    x = m.a(x)
    scale = x[0].numel() / (x.size(1) * x.size(2))
    y = m.b(x / scale)
    return m.o(y.reshape(y.shape[0], y.shape[1], -1).reshape(y.size()))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def scaled_by_width(m, x):
    """a number that is the width: it must stay the original's"""
    x = m.a(x)
    return m.o(m.b(x * x.shape[1] ** -0.5) / m.b.out_channels)


# more of everything


@odd(image(), a=conv(3, 8), b=conv(8 * 4, 6, 1), o=conv(6, 2), half="a 4, b 3")
def unfold_method(m, x):
    x = m.a(x).unfold(2, 2, 2).unfold(3, 2, 2)
    n, c, h, w = x.shape[:4]
    return m.o(m.b(x.permute(0, 1, 4, 5, 2, 3).reshape(n, -1, h, w)))


@odd(image(), a=conv(3, 8), l=nn.Linear(8, 6), o=nn.Linear(6, 2), half="a 4, l 3")
def matrix_transposes(m, x):
    x = m.a(x).mean((2, 3))
    return m.o((m.l.weight @ x.T).mT.relu() + m.l.bias)


@odd(
    tensor(2, 5), tensor(2, 4), a=nn.Linear(5, 8), c=nn.Linear(4, 6), b=nn.Bilinear(8, 6, 10),
    o=nn.Linear(10, 2), half="a 4, c 3, b 5",
)
def bilinear_layer(m, x, y):
    return m.o(m.b(m.a(x), m.c(y)))


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(8, 6)), o=conv(6, 2), half="w 4, a 4")
def einsum_ellipsis(m, x):
    y = torch.einsum("b...c,co->b...o", m.a(x).permute(0, 2, 3, 1), m.w)
    return m.o(torch.einsum("bhwc->bchw", y))


@odd(image(), a=conv(3, 8), b=conv(3, 8), o=nn.Linear(8, 2), half="a 4, b 4")
def einsum_implicit(m, x):
    x, y = m.a(x).flatten(2), m.b(x).flatten(2)
    return m.o(torch.einsum("bcl,bcl->bc", x, y))


@odd(
    image(), a=conv(3, 8), s=nn.Softmax2d(), o=conv(8, 2), frozen="mixes channels", e=conv(8, 6),
    p=conv(6, 2), half="e 3",
)
def softmax_2d(m, x):
    x = m.a(x)
    return m.o(m.s(x)) + m.p(m.e(x))


@odd(
    image(), a=conv(3, 8), z=nn.ZeroPad2d(1), k=nn.ConstantPad2d((1, 0, 1, 0), 0.5),
    u=nn.Upsample(scale_factor=2), r=nn.ReflectionPad2d(1), o=conv(8, 2), half="a 4",
)
def pad_modules(m, x):
    return m.o(m.r(m.u(m.k(m.z(m.a(x))))))


@odd(image(), s=conv(3, 6), a=conv(6, 8), o=conv(8, 2), half="s 3")
def out_argument(m, x):
    x = m.a(m.s(x))
    y = torch.empty_like(x)
    torch.mul(x, 0.5, out=y)
    return m.o(y + x)


@odd(
    tensor(2, 5, 8), t=nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), o=nn.Linear(8, 2),
    half="t.linear1 6",
)
def encoder_layer(m, x):
    return m.o(m.t(x))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def autocast_context(m, x):
    with torch.autocast("cpu", enabled=False):
        x = m.a(x)
    return m.o(m.b(x))


@odd(
    tensor(2, 5, 6), w12=nn.Linear(6, 32), w3=nn.Linear(16, 6), o=nn.Linear(6, 2),
    half="w12 16, w3 3",
)
def swiglu(m, x):
    p, q = m.w12(x).chunk(2, dim=-1)
    return m.o(m.w3(F.silu(p) * q))


@odd(
    tensor(2, 6, 6), q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 10), o=nn.Linear(10, 2),
    cos=torch.rand(6, 8), sin=torch.rand(6, 8), half="q 4, k 4, v 5",
)
def rotary(m, x):
    def turn(t):
        p, q = t.chunk(2, -1)
        return t * m.cos + torch.cat((-q, p), -1) * m.sin

    a = (turn(m.q(x)) @ turn(m.k(x)).transpose(1, 2)).softmax(-1)
    return m.o(a @ m.v(x))


@odd(
    image(), qkv=nn.Linear(3, 24), table=nn.Parameter(torch.randn(9, 2)),
    index=torch.arange(16) * 5 % 9, p=nn.Linear(8, 6), o=nn.Linear(6, 2), half="qkv 12, p 3",
)
def windows(m, x):
    """shifted windows of 2 x 2 with a table of relative positions"""
    x = torch.roll(x.permute(0, 2, 3, 1), (-1, -1), (1, 2))
    n, h, w, c = x.shape
    x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, c)
    q, k, v = m.qkv(x).reshape(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    bias = m.table[m.index].view(4, 4, 2).permute(2, 0, 1).contiguous()
    a = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
    y = m.p((a @ v).transpose(1, 2).reshape(-1, 4, 8))
    y = y.view(n, h // 2, w // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, -1)
    return m.o(torch.roll(y, shifts=(1, 1), dims=(1, 2)))


@odd(image(), a=conv(3, 8), b=conv(2, 6), c=conv(6, 6), o=conv(6, 2), half="a 4, b 3, c 3")
def split_by_computed_sizes(m, x):
    x = m.a(x)
    c = x.shape[1]
    p, q = x.split([c // 4, c - c // 4], 1)
    return m.o(m.b(p) + m.c(q))


@odd(
    image(), a=conv(3, 8), s=nn.Sequential(conv(8, 6), nn.Sequential(nn.ReLU(), conv(6, 4))),
    o=conv(4, 2), half="a 4, s.0 3, s.1.1 2",
)
def called_in_odd_ways(m, x):
    x = m.a.forward(x)
    x = nn.Conv2d.forward(m.s[0], x)
    return m.o(m.s[-1][1].__call__(m.s[-1][0](x)))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def module_and_its_weight(m, x):
    y = m.a(x)
    z = F.conv2d(x, m.a.weight, None, padding=1) + m.a.bias.view(1, -1, 1, 1)
    return m.o(m.b(y + z))


@odd(image(), tensor(2, 4), h=nn.Linear(4, 8 * 3 * 9), b=conv(8, 6), o=conv(6, 2), half="b 3")
def hyper_network(m, x, z):
    """the filters are outputs of a linear layer"""
    w = m.h(z.mean(0)).view(8, 3, 3, 3)
    return m.o(m.b(F.conv2d(x, w, padding=1)))


@odd(
    image(), a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 3, 3)),
    mask=torch.ones(6, 8, 3, 3).triu(), o=conv(6, 2), half="w 3, mask 3, a 4",
)
def masked_conv(m, x):
    return m.o(F.conv2d(m.a(x), m.w * m.mask, padding=1))


@odd(
    image(), a=conv(3, 8), p=nn.Parameter(torch.randn(6, 4)), q=nn.Parameter(torch.randn(4, 8)),
    o=conv(6, 2), half="p 3, a 4",
)
def low_rank(m, x):
    return m.o(F.conv2d(m.a(x), (m.p @ m.q)[:, :, None, None]))


@odd(
    tensor(2, 5, 6), a=nn.Linear(6, 8), base=nn.Linear(8, 10), down=nn.Parameter(torch.randn(8, 4)),
    up=nn.Parameter(torch.randn(4, 10)), o=nn.Linear(10, 2), half="down 4, up 2, a 4, base 5",
)
def low_rank_adapter(m, x):
    x = m.a(x)
    return m.o(m.base(x) + (x @ m.down) @ m.up * 0.5)


@odd(image(), a=conv(3, 12), b=conv(12, 14), o=conv(16, 2), half="a 6, b 7")
def dual_path(m, x):
    """a residual part and a part that grows"""
    x = m.a(x)
    y = m.b(x)
    residual = x[:, :8] + y[:, :8]
    return m.o(torch.cat([residual, x[:, 10:], y[:, 8:]], 1))


@odd(image(), a=conv(3, 8), b=conv(8, 12), o=conv(12, 2), half="a 4, b 6")
def partial_residual(m, x):
    x = m.a(x)
    y = m.b(x)
    return m.o(torch.cat([y[:, :8] + x, y[:, 8:]], dim=1))


@odd(
    image(), s=conv(3, 6), a=conv(6, 8), b=conv(8, 12), o=conv(12, 2),
    half="s 3, a 4, b 6",
)
def partial_residual_in_place(m, x):
    x = m.a(m.s(x))
    y = m.b(x)
    y[:, 0:8] += x
    return m.o(y)


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def changed_through_a_view(m, x):
    x = m.a(x)
    p, q = x.chunk(2, 1)
    p.relu_()
    q.mul_(0.5)
    return m.o(m.b(x))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="b 3")
def changed_through_a_strided_view(m, x):
    x = m.a(x)
    x[:, ::2].mul_(0.5)
    return m.o(m.b(x))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def changed_through_a_permute(m, x):
    x = m.a(x)
    y = x.permute(0, 2, 3, 1)
    y.add_(1).relu_()
    return m.o(m.b(x))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="b 3")
def changed_in_a_shuffle(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    y = x.view(n, 2, c // 2, h, w).transpose(1, 2)
    y.mul_(0.5)
    return m.o(m.b(y.reshape(n, c, h, w)) + m.b(x))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="b 3")
def top_k(m, x):
    x = m.a(x)
    best = x.flatten(2).topk(4, dim=2).values.mean(2)
    return m.o(m.b(x * best[:, :, None, None]))


@odd(image(), s=conv(3, 6), a=conv(6, 8), b=conv(8, 6), o=conv(6, 2), half="s 3, b 3")
def gathers_and_scatters(m, x):
    x = m.a(m.s(x))
    order = x.argsort(dim=1)
    y = torch.gather(x, 1, order)
    return m.o(m.b(torch.zeros_like(x).scatter_add(1, order, y)))


@odd(image(), a=conv(3, 8), proto=nn.Parameter(torch.randn(5, 8)), o=nn.Linear(5, 2), half="a 4")
def prototypes(m, x):
    """squared distances to learned centres"""
    f = m.a(x).mean((2, 3))
    d = (f[:, None] - m.proto[None]).square().sum(-1)
    return m.o((-d).softmax(-1))


@odd(
    image(), a=conv(3, 8), proto=nn.Parameter(torch.randn(5, 8)), o=nn.Linear(5, 2),
    frozen="has no rule", b=conv(3, 6), p=conv(6, 8), half="b 3",
)
def prototypes_by_cdist(m, x):
    f = (m.a(x) + m.p(m.b(x))).mean((2, 3))
    return m.o(torch.cdist(f, m.proto))


@odd(
    image(), a=conv(3, 8), d=conv(8, 8, groups=8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3, d 4",
)
def depthwise_by_function(m, x):
    x = m.a(x)
    return m.o(m.b(F.conv2d(x, m.d.weight, m.d.bias, padding=1, groups=x.shape[1])))


@odd(
    image(), s=conv(3, 6), a=conv(6, 8), b=conv(8, 6), o=conv(6, 2), half="s 3, a 4, b 3",
)
def mean_of_everything(m, x):
    found = {}
    x = m.s(x)
    for name in ("a", "b"):
        x = found[name] = getattr(m, name)(x)
    total = sum(v.mean() for v in found.values())
    return m.o(x) * total


@odd(
    image(), a=conv(3, 8), h=nn.ModuleList([conv(8, 4), conv(8, 4)]), o=conv(8, 2),
    half="a 4, h.0 2, h.1 2",
)
def reduce_with_cat(m, x):
    import functools

    x = m.a(x)
    return m.o(functools.reduce(lambda p, q: torch.cat([p, q], 1), [h(x) for h in m.h]))


@odd(image(), a=conv(3, 8), b=conv(8, 16), o=conv(4, 2), half="a 4, b 8")
def max_feature_map(m, x):
    """LightCNN: the larger of two halves, twice"""
    x = m.b(m.a(x))
    x = torch.max(*torch.split(x, 8, 1))
    return m.o(torch.maximum(*x.chunk(2, dim=1)))


@odd(image(), a=conv(3, 12), b=conv(12, 6), o=conv(6, 2), half="a 6, b 3")
def group_attention(m, x):
    """SGE: every group of channels has a gate of its own, from its own mean"""
    x = m.a(x)
    n, c, h, w = x.shape
    g = x.reshape(n * 3, -1, h, w)
    gate = (g * g.mean((2, 3), keepdim=True)).sum(1, keepdim=True).sigmoid()
    return m.o(m.b((g * gate).view(n, c, h, w)))


@odd(image(), a=conv(3, 12), w=par(1, 3, 1, 1), n=nn.GroupNorm(4, 4), o=conv(12, 2), half="a 6")
def shuffle_attention(m, x):
    """SA-Net: batch and groups merge, half of each group is gated"""
    x = m.a(x)
    n, c, h, w = x.shape
    x = x.reshape(n * 3, -1, h, w)
    p, q = x.chunk(2, dim=1)
    p = p * p.mean((2, 3), keepdim=True).sigmoid()
    q = q * q.amax((2, 3), keepdim=True).sigmoid()
    x = torch.cat([p, q], dim=1).reshape(n, -1, h, w)
    x = x.reshape(n, 2, -1, h, w).permute(0, 2, 1, 3, 4).reshape(n, -1, h, w)
    return m.o(x)


@odd(image(), a=conv(3, 8), b=conv(3, 8), o=conv(16, 2), half="a 4, b 4")
def interleaved_by_view(m, x):
    x, y = m.a(x), m.b(x)
    n, c, h, w = x.shape
    return m.o(torch.cat([x.view(n, c, 1, h, w), y.view(n, c, 1, h, w)], 2).view(n, 2 * c, h, w))


@odd(image(), a=conv(3, 8), o=nn.Linear(16, 2), half="a 4")
def mean_and_deviation(m, x):
    x = m.a(x).flatten(2)
    return m.o(torch.cat([x.mean(-1), x.std(-1)], 1))


@odd(
    tensor(2, 3, 5, 5), a=conv(3, 8), b=nn.Conv2d(8, 6, (5, 5)), o=nn.Linear(6, 2), half="a 4, b 3",
)
def kernel_as_wide_as_the_picture(m, x):
    return m.o(m.b(m.a(x))[:, :, 0, 0])


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="b 3")
def where_by_mask_of_shape(m, x):
    x = m.a(x)
    mask = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
    return m.o(m.b(torch.where(mask, x, x.new_tensor(0.0))))


@odd(image(), a=conv(3, 8), l=nn.Linear(8, 6), o=nn.Linear(6, 2), half="a 4, l 3")
def boolean_index(m, x):
    x = m.a(x).flatten(2).transpose(1, 2)
    keep = torch.arange(64) % 3 != 0
    return m.o(m.l(x[:, keep]).mean(1))


@odd(image(), a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), o=conv(8, 2), half="a 4, b 4, c 4")
def mean_of_stack(m, x):
    x = m.a(x)
    return m.o(torch.stack([x, m.b(x), m.c(x)], 0).mean(0))


@odd(image(), a=conv(3, 8), b=conv(8, 8), o=conv(8, 2), half="a 4, b 4")
def median_of_stack(m, x):
    x = m.a(x)
    return m.o(torch.stack([x, m.b(x), x * 2], -1).median(-1)[0])


@odd(image(), a=conv(3, 16), b=conv(4, 6), o=conv(6, 2), half="a 8, b 3")
def four_quarters(m, x):
    return m.o(sum(m.b(part) for part in m.a(x).chunk(4, 1)))


@odd(
    image(), a=conv(3, 16), bs=nn.ModuleList(conv(4, 4) for _ in range(4)), o=conv(16, 2),
    half="a 8, bs.0 2, bs.1 2, bs.2 2, bs.3 2",
)
def cascaded_groups(m, x):
    """EfficientViT's cascade: each piece adds the last one's result"""
    found, last = [], None
    for part, layer in zip(m.a(x).chunk(4, dim=1), m.bs, strict=True):
        last = layer(part if last is None else part + last)
        found.append(last)
    return m.o(torch.cat(found, 1))


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(8, 4, 4)), o=conv(8, 2), half="w 4, a 4")
def resized_position_table(m, x):
    x = m.a(x)
    return m.o(x + F.interpolate(m.w[None], size=x.shape[-2:], mode="bilinear"))


@odd(image(), a=conv(3, 8), t=nn.Parameter(torch.randn(64, 8)), o=nn.Linear(8, 2), half="a 4")
def sliced_position_table(m, x):
    x = m.a(x).flatten(2).permute(0, 2, 1)
    return m.o(x + m.t[: x.shape[1]].unsqueeze(0))


# products, windows over channels, weights made of weights, changes through views


@odd(
    image(), a=conv(3, 8), b=conv(3, 6), l=nn.Linear(48, 5), o=nn.Linear(5, 2),
    half="a 4, b 3, l 3",
)
def bilinear_cnn(m, x):
    p, q = m.a(x).mean((2, 3)), m.b(x).mean((2, 3))
    return m.o(m.l((p.unsqueeze(2) * q.unsqueeze(1)).flatten(1)))


@odd(
    image(), a=conv(3, 8), b=conv(3, 6), l=nn.Linear(48, 5), o=nn.Linear(5, 2),
    half="a 4, b 3, l 3",
)
def bilinear_einsum(m, x):
    return m.o(m.l(torch.einsum("bchw,bdhw->bcd", m.a(x), m.b(x)).reshape(x.shape[0], -1)))


@odd(
    image(), a=conv(3, 8), b=conv(3, 6), g=conv(48, 12, groups=2), o=conv(12, 2),
    half="a 4, b 3, g 6",
)
def outer_grouped(m, x):
    p, q = m.a(x), m.b(x)
    y = (p.unsqueeze(2) * q.unsqueeze(1)).flatten(1, 2)
    return m.o(m.g(y))


@odd(image(), a=conv(3, 8), l=nn.Linear(8, 6), b=conv(8, 5), o=conv(5, 2), half="a 4, b 3")
def conv_over_linear_width(m, x):
    return m.o(m.b(m.l(m.a(x))))


@odd(
    image(), a=conv(3, 8), b=conv(4, 6), c=conv(6, 6), d=conv(2, 6), e=conv(3, 6), o=conv(6, 2),
    half="a 7, b 3, c 3, d 3, e 3",
)
def many_slices(m, x):
    x = m.a(x)
    return m.o(
        m.b(x[:, -4:])
        + m.c(x[:, :-2])
        + m.d(x[:, 2:-2:2])
        + m.e(x[:, 1:7][:, ::2])
        + m.d(x[:, 5:7])
    )


@odd(image(), a=conv(3, 8), b=conv(4, 6), o=conv(6, 2), half="a 4, b 3")
def sliding(m, x):
    x = m.a(x)
    return m.o(sum(m.b(x[:, i : i + 4]) for i in range(0, 5, 2)))


@odd(image(), a=conv(3, 8), b=conv(4, 6), o=conv(6, 2), half="a 4, b 3")
def bool_channels(m, x):
    return m.o(m.b(m.a(x)[:, torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)]))


@odd(image(), a=conv(3, 8), b=conv(5, 6), o=conv(6, 2), half="a 5, b 3")
def dup_index(m, x):
    return m.o(m.b(m.a(x)[:, [1, 1, 3, 7, 3]]))


@odd(image(), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2), half="a 4, b 3")
def none_index(m, x):

    x = m.a(x)
    return m.o(m.b(x[:, :, None][..., 0, :, :]))


@odd(image(), a=conv(3, 1), b=conv(3, 8), c=conv(8, 6), o=conv(6, 2), half="c 3")
def mono_expand(m, x):
    return m.o(m.c(m.a(x).expand(-1, 8, -1, -1) * m.b(x)))


@odd(image(), a=conv(3, 8), b=conv(3, 8), c=conv(16, 6), o=conv(6, 2), half="a 4, b 4, c 3")
def stack_last(m, x):

    p, q = m.a(x), m.b(x)
    return m.o(
        m.c(torch.stack([p, q], -1).permute(0, 4, 1, 2, 3).reshape(x.shape[0], -1, *x.shape[2:]))
    )


@odd(image(), a=conv(3, 24), o=nn.Linear(8, 2), half="a 12")
def unbind_view(m, x):
    y = m.a(x)
    n = y.shape[0]
    q, k, v = y.view(n, 3, 2, 4, -1).unbind(1)
    at = (q.transpose(-2, -1) @ k).softmax(-1)
    return m.o((v @ at).reshape(n, 8, -1).mean(-1))


@odd(
    image(), half="o 2", a=conv(3, 8), g=conv(8, 16, groups=4), bn=nn.BatchNorm2d(16),
    p=nn.PixelShuffle(2), o=conv(4, 2),
)
def grouped_shuffle_up(m, x):
    return m.o(m.p(m.bn(m.g(m.a(x)))))


@odd(
    image(), a=conv(3, 16), p=nn.PixelShuffle(2), u=nn.PixelUnshuffle(2), o=conv(16, 2), half="a 8",
)
def up_down(m, x):
    return m.o(m.u(m.p(m.a(x))))


@odd(image(), a=conv(3, 16), c=conv(4, 4), o=conv(16, 2), u=nn.PixelUnshuffle(2), half="a 8, c 2")
def up_conv_down(m, x):
    return m.o(m.u(m.c(F.pixel_shuffle(m.a(x), 2))))


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 3, 3)), o=conv(6, 2), half="w 3, a 4")
def im2col(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o((m.w.view(6, -1) @ F.unfold(x, 3, padding=1)).view(n, -1, h, w))


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 3, 3)), o=conv(6, 2), half="w 3, a 4")
def im2col_reshape(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o(
        (
            F.unfold(x, 3, padding=1)
            .transpose(1, 2)
            .matmul(m.w.view(m.w.size(0), -1).t())
            .transpose(1, 2)
        ).view(n, 6, h, w)
    )


@odd(
    image(), half="a 4, w1 2, w2 1", a=conv(3, 8), w1=nn.Parameter(torch.randn(4, 8, 1, 1)),
    w2=nn.Parameter(torch.randn(2, 8, 1, 1)), o=conv(6, 2),
)
def cat_weights(m, x):
    return m.o(F.conv2d(m.a(x), torch.cat([m.w1, m.w2], 0)))


@odd(
    image(), half="a 5, w1 3, w2 3", a=conv(3, 8), w1=nn.Parameter(torch.randn(6, 5, 1, 1)),
    w2=nn.Parameter(torch.randn(6, 3, 1, 1)), o=conv(6, 2),
)
def cat_weights_in(m, x):
    return m.o(F.conv2d(m.a(x), torch.cat([m.w1, m.w2], 1)))


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 1, 1)), o=conv(6, 2), half="w 3, a 4")
def split_weights(m, x):
    x = m.a(x)
    return m.o(torch.cat([F.conv2d(x, m.w[:4]), F.conv2d(x, m.w[4:])], 1))


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 1, 1)), o=conv(6, 2), half="w 3, a 4")
def split_weights_in(m, x):
    x = m.a(x)
    return m.o(F.conv2d(x[:, :3], m.w[:, :3]) + F.conv2d(x[:, 3:], m.w[:, 3:]))


@odd(
    image(), half="a 4, w1 3, w2 3, b1 3, b2 3", a=conv(3, 8),
    w1=nn.Parameter(torch.randn(6, 8, 3, 3)), w2=nn.Parameter(torch.randn(6, 8, 1, 1)), b1=par(6),
    b2=par(6), o=conv(6, 2),
)
def rep_weights(m, x):
    return m.o(F.conv2d(m.a(x), m.w1 + F.pad(m.w2, [1, 1, 1, 1]), m.b1 + m.b2, padding=1))


@odd(image(), w=nn.Parameter(torch.randn(8, 3, 3, 3)), o=conv(3, 2), half="w 4")
def tied_conv_ae(m, x):
    return m.o(
        F.conv_transpose2d(
            F.relu(F.conv2d(x, m.w, stride=2, padding=1)),
            m.w,
            stride=2,
            padding=1,
            output_padding=1,
        )
    )


@odd(image(), a=conv(3, 8), l=nn.Linear(8, 8), o=conv(8, 2), half="a 4, l 4")
def permuted_gate(m, x):
    x = m.a(x)
    g = m.l(x.mean((2, 3))).sigmoid()
    return m.o((x.permute(2, 3, 0, 1) * g).permute(2, 3, 0, 1))


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(4, 2, 6)), o=conv(6, 2), half="a 4")
def block_linear(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o(torch.einsum("bgchw,gco->bohw", x.view(n, 4, 2, h, w), m.w))


@odd(image(), a=conv(3, 8), w=nn.Parameter(torch.randn(4, 2, 3)), o=conv(12, 2), half="a 4")
def block_linear_out(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o(torch.einsum("bgchw,gco->bgohw", x.view(n, 4, 2, h, w), m.w).flatten(1, 2))


@odd(image(), a=conv(3, 8), k=nn.Parameter(torch.randn(4, 3, 3)), o=conv(8, 2), half="k 2, a 4")
def shared_group_kernels(m, x):
    x = m.a(x)
    return m.o(F.conv2d(x, m.k.repeat_interleave(2, 0).unsqueeze(1), padding=1, groups=8))


@odd(image(), a=conv(3, 8), k=nn.Parameter(torch.randn(1, 1, 3, 3)), o=conv(8, 2), half="a 4")
def fold_batch_kernel(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o(F.conv2d(x.reshape(n * c, 1, h, w), m.k, padding=1).view(n, c, h, w))


@odd(image(), a=conv(3, 8), bn=nn.BatchNorm2d(2), o=conv(8, 2), half="a 4, bn 1")
def bn_on_split(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o(m.bn(x.view(n * 4, c // 4, h, w)).view(n, c, h, w))


@odd(image(), a=conv(3, 8), bn=nn.BatchNorm2d(4), o=conv(8, 2), half="a 4, bn 2")
def split_bn(m, x):
    return m.o(torch.cat([m.bn(c) for c in m.a(x).chunk(2, 1)], 1))


@odd(
    image(), half="a 4, i 2, bn1 2", a=conv(3, 8), bn1=nn.BatchNorm2d(4),
    i=nn.InstanceNorm2d(4, affine=True), o=conv(8, 2),
)
def ibn(m, x):
    p, q = torch.split(m.a(x), [4, 4], 1)
    return m.o(torch.cat([m.i(p.contiguous()), m.bn1(q.contiguous())], 1))


@odd(image(), a=conv(3, 8), b=conv(8, 8), o=conv(8, 2), half="a 4, b 4")
def inplace_after_use(m, x):
    x = m.a(x)
    y = m.b(x)
    x += y
    x *= 0.5
    x = x.relu_()
    y -= x
    return m.o(x / (y.abs() + 1))


@odd(image(), a=conv(3, 8), b=conv(8, 4), o=conv(8, 2), half="a 4, b 2")
def inplace_chunk_write(m, x):
    x = m.a(x)
    p, q = x.chunk(2, 1)
    p += m.b(x)
    q *= p.sigmoid()
    return m.o(x)


@odd(image(), a=conv(3, 8), b=conv(3, 4), o=conv(8, 2), half="b 2, a 4")
def slice_copy(m, x):
    y = m.b(x)
    x = m.a(x)
    x[:, 4:].copy_(y)
    return m.o(x)


@odd(image(), a=conv(3, 8), b=conv(3, 4), o=conv(8, 2), half="b 2, a 4")
def narrow_add(m, x):
    y = m.b(x)
    x = m.a(x)
    x.narrow(1, 2, 4).add_(y)
    return m.o(x)


@odd(image(), s=conv(3, 6), a=conv(6, 8), b=conv(6, 4), o=conv(12, 2), half="s 3")
def out_cat(m, x):
    x = m.s(x)
    y = m.b(x)
    x = m.a(x)
    out = torch.empty(2, 12, 8, 8, dtype=x.dtype)
    torch.cat([x, y], 1, out=out)
    return m.o(out)


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 4")
def reversed_cat(m, x):
    x = m.a(x)
    return m.o(torch.cat(x.split(2, 1)[::-1], 1))


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 4")
def sorted_slices(m, x):
    x = m.a(x)
    return m.o(torch.cat([x[:, 4:], x[:, :4]], 1) + x)


@odd(image(), s=conv(3, 6), a=conv(6, 8), o=conv(8, 2), v=conv(6, 8), half="s 3")
def channel_attention(m, x):
    x = m.a(m.s(x))
    n, c, h, w = x.shape
    q = x.view(n, c, -1)
    e = q @ q.transpose(1, 2)
    e = e.max(-1, keepdim=True)[0].expand_as(e) - e
    return m.o((e.softmax(-1) @ q).view(n, c, h, w) + x)


@odd(image(), a=conv(3, 8), b=conv(4, 6), o=conv(6, 2), half="b 3")
def negative_pad(m, x):
    return m.o(m.b(F.pad(m.a(x), (0, 0, 0, 0, -2, -2))))


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 4")
def mask_set_to_zero(m, x):
    x = m.a(x)
    x[x < 0.1] = 0
    return m.o(x.exp())


@odd(image(), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2), half="a 4, b 4")
def mask_set_to_number(m, x):
    y = m.b(x)
    x = m.a(x)
    x[y > x] = 0.5
    return m.o(x * y)


@odd(image(), a=conv(3, 8), o=conv(1, 2), half="a 4")
def mask_set_to_zero_and_summed(m, x):
    x = m.a(x)
    x[x < 0.1] = 0
    return m.o(x.sum(1, keepdim=True))


@odd(image(), s=conv(3, 6), a=conv(6, 8), o=conv(1, 2), half="s 3", frozen="mixes channels")
def mask_set_to_number_and_summed(m, x):
    x = m.a(m.s(x))
    x[x < 0.1] = 0.5
    return m.o(x.sum(1, keepdim=True))


@odd(image(), a=conv(3, 8), o=conv(8, 2), w=par(8, 3, 1, 1), half="w 4")
def mask_set_in_weights(m, x):
    w = m.w * 1.0
    w[w < 0] = 0
    return m.o(F.conv2d(x, w))


@odd(tensor(2, 6, 5), s=nn.Linear(5, 6), a=nn.Linear(6, 8), o=nn.Linear(8, 3), t=par(8),
     half="s 3, a 4, t 4")
def mask_set_to_token(m, x):
    y = m.a(m.s(x))
    y[x[..., 0] > 0] = m.t
    return m.o(y)


@odd(tensor(2, 6, 5), s=nn.Linear(5, 6), a=nn.Linear(6, 8), o=nn.Linear(8, 3), half="s 3, a 4")
def rows_set_by_positions(m, x):
    y = m.a(m.s(x))
    y[:, x[0, :, 0].argsort()[:2]] = 0.0
    return m.o(y)


@odd(tensor(2, 6, 5), s=nn.Linear(5, 6), a=nn.Linear(6, 8), o=nn.Linear(8, 3),
     half="s 3, a 4")
def rows_picked_by_positions(m, x):
    y = m.a(m.s(x))
    return m.o(y[:, x[0, :, 0].argsort()[1:4]] + y[-1:, None, x[0, :, 1].argsort()[:3]].squeeze(1))


@odd(tensor(2, 6, 5), a=nn.Linear(5, 8), b=nn.Linear(5, 8), o=nn.Linear(8, 3), half="a 4, b 4")
def rows_laid_out_by_positions(m, x):
    y = m.a(x)
    order = x[0, :, 0].argsort()
    laid = torch.zeros_like(y)
    laid[:, order[:4]] = m.b(x)[:, order[2:]]
    return m.o(laid + y)


@odd(tensor(2, 6, 5), s=nn.Linear(5, 6), a=nn.Linear(6, 8), o=nn.Linear(6, 3),
     half="s 3, a 8", frozen="computed positions")
def channels_picked_by_positions(m, x):
    y = m.a(m.s(x))
    return m.o(y[..., x[0, :, 0].argsort()])


@odd(tensor(2, 6, 5), s=nn.Linear(5, 6), a=nn.Linear(6, 8), o=nn.Linear(8, 3), half="s 3",
     frozen="constant or an input",
     k=torch.arange(96).view(2, 6, 8) % 3 > 0)
def constant_mask_set(m, x):
    y = m.a(m.s(x))
    y[m.k] = 0.0
    return m.o(y.exp())


@odd(tensor(2, 6, 5), a=nn.Linear(5, 8), o=nn.Linear(8, 3), half="a 4",
     k=torch.arange(12).view(2, 6) > 5)
def constant_rows_set(m, x):
    y = m.a(x)
    y[m.k] = 0.0
    return m.o(y.exp())


@odd(image(8), s=conv(8, 6), a=conv(6, 8), o=conv(8, 2), half="s 3", frozen="constant or an input")
def mask_of_the_input_set(m, x):
    y = m.a(m.s(x))
    y[x > 0] = 0
    return m.o(y)


@odd(image(), a=conv(3, 8), b=conv(4, 4), o=conv(8, 2), half="a 4, b 2")
def first_channels_assigned(m, x):
    x = m.a(x).clone()
    x[:, :4] = m.b(x[:, :4].clone())
    return m.o(x)


@odd(image(), a=conv(3, 8), b=conv(3, 4), o=conv(8, 2), half="a 4, b 2")
def every_other_channel_assigned(m, x):
    y = m.a(x).permute(0, 2, 3, 1).contiguous()
    y[..., ::2] = m.b(x).permute(0, 2, 3, 1)
    return m.o(y.permute(0, 3, 1, 2))


@odd(image(), a=conv(3, 8), b=conv(3, 4), o=conv(8, 2), half="a 4, b 2")
def listed_channels_assigned(m, x):
    y = m.a(x).clone()
    y[:, [5, 1, 2, 7]] = m.b(x)
    return m.o(y)


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 5", frozen="is assigned to in part")
def single_channels_assigned(m, x):
    y = m.a(x).clone()
    y[:, 2] = 0.3
    y[:, 4:5] = 1
    return m.o(y)


@odd(image(), a=conv(3, 8), o=conv(8, 2), half="a 6", frozen="meets a constant")
def numbers_and_inputs_assigned(m, x):
    y = m.a(x).clone()
    y[:, 2:5] = 0.3
    y[:, :3, 2:] = x[:, :, 2:]
    return m.o(y)


@odd(tensor(4, 3, 8, 8), a=conv(3, 8), o=conv(8, 2), half="a 4")
def shifted_in_time(m, x):
    y = m.a(x).view(2, 2, 8, 8, 8)
    out = torch.zeros_like(y)
    out[:, :-1, :2] = y[:, 1:, :2]
    out[:, 1:, 2:4] = y[:, :-1, 2:4]
    out[:, :, 4:] = y[:, :, 4:]
    return m.o(out.view(4, 8, 8, 8))


# rows of blocks that have columns of their own


@odd(image(), a=conv(3, 8), b=conv(3, 6), o=conv(24, 2), half="a 4, b 4")
def blocks_multiplied_out(m, x):
    a, b = m.a(x).view(2, 2, 4, 1, 8, 8), m.b(x).view(2, 2, 1, 3, 8, 8)
    return m.o((a * b).view(2, 24, 8, 8))


@odd(image(), a=conv(3, 8), b=conv(3, 6), o=conv(8, 2), half="a 4, b 6", frozen="whole rows")
def blocks_multiplied_and_summed(m, x):
    a, b = m.a(x).view(2, 2, 4, 1, 8, 8), m.b(x).view(2, 2, 1, 3, 8, 8)
    return m.o((a * b).sum(3).view(2, 8, 8, 8))


# one element that becomes many


@odd(image(), a=conv(3, 8), o=conv(8, 2), f=torch.rand(1, 1, 3, 3), half="a 4")
def one_filter_for_all(m, x):
    x = m.a(x)
    c = x.shape[1]
    x = F.conv2d(x, m.f.expand(c, -1, -1, -1), padding=1, groups=c)
    return m.o(F.conv2d(x, m.f.repeat(8, 1, 1, 1), padding=1, groups=c))


@odd(image(), a=conv(3, 8), s=conv(8, 1), o=conv(8, 2), half="a 4")
def gate_repeated(m, x):
    x = m.a(x)
    gate = m.s(x).sigmoid()
    gated = x * gate.repeat(1, 8, 1, 1) + x * gate.expand(-1, 8, -1, -1)
    return m.o(gated + torch.tile(gate, (8, 1, 1)))


@odd(image(), a=conv(3, 8), w=par(6, 8, 3, 3), o=conv(6, 2), half="a 4, w 3")
def bias_of_zeros(m, x):
    return m.o(F.conv2d(m.a(x), m.w, torch.zeros(6, dtype=x.dtype), padding=1))


@odd(tensor(2, 6, 3), a=nn.Linear(3, 8), t=nn.Conv1d(6, 6, 1), o=nn.Linear(8, 2), half="a 4, t 6")
def tokens_as_channels(m, x):
    """A kernel of one element leaves the channels that lie behind alone."""
    x = m.a(x)
    return m.o(x + m.t(x))


@odd(tensor(2, 6, 3), a=nn.Linear(3, 8), o=nn.Linear(8, 2), half="a 4")
def added_at_positions(m, x):
    x = m.a(x)
    out = x.new_zeros(2, 4, x.shape[-1])
    out.index_add_(1, torch.tensor([0, 1, 1, 3, 2, 0]), x)
    return m.o(out)


@odd(
    tensor(2, 3), a=nn.Linear(3, 4), w=par(1, 3, 4, 5), b=nn.Linear(15, 2), o=nn.Linear(2, 2),
    half="b 1",
)
def width_of_several_layers(m, x):
    """Rows that stay and columns that go are one dim: `in_features` follows the columns."""
    x = (m.a(x)[:, None, None, :] @ m.w).squeeze(2)
    return m.o(m.b((x + x.softmax(1)).flatten(1)))


# units of recurrent layers


@odd(tensor(2, 7, 3), a=nn.Linear(3, 8), r=nn.LSTM(8, 6), o=nn.Linear(6, 2),
     half="a 4, r.weight_ih_l0 12, r.weight_hh_l0 12, r.bias_ih_l0 12")
def lstm_units(m, x):
    return m.o(m.r(m.a(x))[0])


@odd(tensor(2, 7, 3), a=nn.Linear(3, 8), o=nn.Linear(12, 2), half="a 4, r.weight_ih_l1_reverse 9",
     r=nn.GRU(8, 6, num_layers=2, bidirectional=True, batch_first=True))
def stacked_both_ways(m, x):
    """Equally many units of each layer and direction, of other places."""
    y, _ = m.r(m.a(x))
    return m.o(torch.cat([y[:, -1, :6], y[:, 0, 6:]], 1))


@odd(tensor(2, 7, 3), r=nn.LSTM(3, 6, 2, bidirectional=True), o=nn.Linear(24, 2), c=nn.Linear(6, 2),
     half="r.weight_ih_l0 12, r.weight_hh_l1_reverse 12")
def last_states(m, x):
    _, (h, c) = m.r(x)
    h = h.permute(1, 0, 2).flatten(1)
    return m.o(h), m.c(c[-1])


@odd(tensor(2, 7, 3), r=nn.LSTM(3, 8, proj_size=6, num_layers=2), o=nn.Linear(6, 2),
     half="r.weight_ih_l0 16, r.weight_hr_l0 3, r.weight_hh_l1 16")
def projected_units(m, x):
    return m.o(m.r(x)[0])


@odd(tensor(2, 7, 3), r=nn.GRU(3, 6), s=nn.GRU(6, 6), o=nn.Linear(6, 2),
     half="r.weight_ih_l0 9, s.weight_hh_l0 9")
def encoder_and_decoder(m, x):
    y, h = m.r(x)
    return m.o(m.s(y, h)[0])


@odd(tensor(2, 7, 3), i=nn.Linear(3, 6), r=nn.GRU(3, 6), o=nn.Linear(6, 2),
     half="i 3, r.weight_hh_l0 9")
def computed_start(m, x):
    return m.o(m.r(x, m.i(x.mean(0)).unsqueeze(0))[0])


@odd(tensor(2, 7, 3), r=nn.LSTM(3, 6, batch_first=True), o=nn.Linear(6, 2),
     half="r.weight_ih_l0 12")
def start_of_zeros(m, x):
    h = torch.zeros(1, x.size(0), 6, dtype=x.dtype)
    c = torch.zeros(1, x.size(0), m.r.hidden_size, dtype=x.dtype)
    return m.o(m.r(x, (h, c))[0][:, -1])


@odd(tensor(2, 7, 3), tensor(1, 7, 6), a=nn.Linear(3, 8), r=nn.GRU(8, 6), o=nn.Linear(6, 2),
     half="a 4, r.weight_ih_l0 18", frozen="starts from a state without channels")
def start_from_the_input(m, x, h):
    return m.o(m.r(m.a(x), h)[0])


@odd(tensor(2, 7, 3), r=nn.GRU(3, 6), h=par(1, 1, 6), o=nn.Linear(6, 2), half="r.weight_ih_l0 9")
def learned_start(m, x):
    return m.o(m.r(x, m.h.expand(-1, x.shape[1], -1).contiguous())[0])


@odd(tensor(2, 3, 4), a=nn.Linear(4, 8), r=nn.LSTMCell(8, 6), o=nn.Linear(6, 2),
     half="a 4, r.weight_hh 12")
def cell_in_a_loop(m, x):
    x = m.a(x)
    h = c = x.new_zeros(x.size(0), 6)
    for t in range(x.size(1)):
        h, c = m.r(x[:, t], (h, c))
    return m.o(h)


@odd(tensor(2, 7, 3), r=nn.RNN(3, 6, nonlinearity="relu", bias=False), o=nn.Linear(6, 2),
     half="r.weight_hh_l0 3")
def units_added(m, x):
    y, h = m.r(x)
    return m.o(y + h)


@odd(tensor(5, 7, 3), a=nn.Linear(3, 8), r=nn.GRU(8, 8), o=nn.Linear(8, 2),
     half="a 4, r.weight_ih_l0 12")
def one_recurrent_layer_twice(m, x):
    x = m.a(x)
    x = x + m.r(x)[0]
    return m.o(x + m.r(x)[0])


@odd(tensor(2, 7, 3), r=nn.LSTM(3, 6, bidirectional=True), k=nn.Linear(6, 4),
     half="r.weight_ih_l0 12, r.weight_ih_l0_reverse 12",
     o=nn.Linear(4, 2))
def ways_summed(m, x):
    """Both directions must keep the same units."""
    y, _ = m.r(x)
    t, n, _ = y.shape
    return m.o(m.k(y.view(t, n, 2, 6).sum(2)))


@odd(tensor(2, 7, 3), a=nn.Linear(3, 8), r=nn.LSTM(8, 6), o=nn.Linear(6, 2),
     half="a 4, r.weight_ih_l0 24", frozen="the network's output")
def state_given_out(m, x):
    y, (h, _) = m.r(m.a(x))
    return m.o(y), h


# positions that are computed, along dims without channels


@odd(tensor(2, 6, 3), a=nn.Linear(3, 8), o=nn.Linear(8, 2), half="a 4")
def tokens_kept_by_score(m, x):
    x = m.a(x)
    best = x.sum(-1).topk(4, 1)[1]
    taken = torch.gather(x, 1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    again = torch.gather(x, 1, best.unsqueeze(-1).repeat(1, 1, 8))
    rows = torch.arange(2)[:, None]
    return m.o(taken + again + x[rows, best] + torch.take_along_dim(x, best[..., None], 1))


@odd(tensor(2, 6, 3), a=nn.Linear(3, 8), o=nn.Linear(8, 2), half="a 4")
def tokens_in_computed_order(m, x):
    order = x.mean((0, 2)).argsort()
    x = m.a(x)
    there = torch.zeros_like(x)
    there[:, order] = x.index_select(1, order)
    there[torch.arange(2), x.sum(-1).argmax(1)] = 0.5
    return m.o(there + x[:, order] + x.clone().index_copy(1, order, x.flip(1)))


@odd(tensor(2, 6, 3), a=nn.Linear(3, 8), o=nn.Linear(8, 2), half="a 4")
def tokens_scattered(m, x):
    where = (x.mean(-1) > 0).long().unsqueeze(-1)
    x = m.a(x)
    y = torch.zeros_like(x).scatter(1, x.detach().sum(-1).argsort(1).unsqueeze(-1).expand_as(x), x)
    z = x.new_zeros(2, 2, 8).scatter_add(1, where.expand(-1, -1, 8), x)
    most = x.new_zeros(2, 2, 8).scatter_reduce(1, where.expand_as(x), x, "amax", include_self=False)
    return m.o(torch.cat([y, z, most], 1))


@odd(tensor(2, 6, 3), tensor(8), s=nn.Linear(3, 4), a=nn.Linear(4, 8), o=nn.Linear(8, 2),
     half="s 2, a 8", frozen="by computed positions")
def channels_in_computed_order(m, x, y):
    return m.o(m.a(m.s(x))[..., y.argsort()])


@odd(tensor(2, 6, 3), a=nn.Linear(3, 8), o=nn.Linear(8, 2), half="a 4")
def waves_of_position(m, x):
    """Sines and cosines assigned to every other channel, of another dtype."""
    x = m.a(x)
    table = torch.zeros(6, 8, dtype=x.dtype)
    at = torch.arange(6)[:, None]
    table[:, 0::2] = torch.sin(at / 10.0)
    table[:, 1::2] = torch.cos(at / 10.0)
    return m.o(x + table)
