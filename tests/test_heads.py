"""Attention heads: dims of each, whole ones, or none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_small import masked, randomise

import fxprune

WIDTH, HEADS, DIM, TOKENS = 24, 4, 6, 9


class Attention(nn.Module):
    """What all have: an embedding, heads, a projection, and an MLP on the residual stream."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down, self.head = (
            nn.Linear(WIDTH, 32),
            nn.Linear(32, WIDTH),
            nn.Linear(WIDTH, 3),
        )
        self.parts()

    def parts(self) -> None:
        raise NotImplementedError

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.proj(self.attend(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Packed(Attention):
    """One layer for queries, keys and values; the fused product."""

    def parts(self):
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def attend(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        return self.product(q, k, v).transpose(1, 2).reshape(b, n, c)

    def product(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class Explicit(Packed):
    """The product written out, with a scale of its own."""

    def product(self, q, k, v):
        return (q * DIM**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


class Table(Packed):
    """A table of relative positions, one column a head, added to the map (Swin)."""

    def parts(self):
        super().parts()
        self.table = nn.Parameter(torch.randn(20, HEADS))
        self.register_buffer("index", torch.randint(0, 20, (TOKENS, TOKENS)))

    def bias(self):
        return self.table[self.index.view(-1)].view(TOKENS, TOKENS, -1).permute(2, 0, 1)

    def product(self, q, k, v):
        return ((q @ k.transpose(-2, -1)) * 0.4 + self.bias()[None]).softmax(-1) @ v


class TableAsMask(Table):
    """The same table given to the fused product (BEiT)."""

    def product(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias()[None])


class Talking(Packed):
    """Heads mixed by a layer before and after softmax (CaiT)."""

    def parts(self):
        super().parts()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def product(self, q, k, v):
        maps = q @ k.transpose(-2, -1)
        maps = self.before(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        return self.after(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class Normed(Packed):
    """Queries and keys normalised by a layer that all heads share, values turned by a constant."""

    def parts(self):
        super().parts()
        self.q_norm, self.k_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.register_buffer("turn", torch.randn(TOKENS, DIM))

    def product(self, q, k, v):
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class Rotary(Packed):
    """Queries and keys turned by positions: pairs of dims, constants along them."""

    def parts(self):
        super().parts()
        self.register_buffer("cos", torch.randn(TOKENS, DIM))
        self.register_buffer("sin", torch.randn(TOKENS, DIM))

    def turned(self, x):
        half = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        return x * self.cos + half * self.sin

    def product(self, q, k, v):
        return F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)


class Apart(Attention):
    """A layer each for queries, keys and values; keys wider than values."""

    def parts(self):
        self.q, self.k = nn.Linear(WIDTH, HEADS * 10), nn.Linear(WIDTH, HEADS * 10)
        self.v = nn.Linear(WIDTH, WIDTH)

    def attend(self, x):
        b, n, c = x.shape
        q, k = (f(x).view(b, n, HEADS, 10).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).view(b, n, HEADS, DIM).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Einsum(Attention):
    """Heads by letters."""

    def parts(self):
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def attend(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)) for t in (q, k, v))
        maps = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", maps, v).flatten(2)


class Module(Attention):
    """PyTorch's own module."""

    def parts(self):
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Crossed(Packed):
    """Maps from dims to dims, not from tokens to tokens (XCiT)."""

    def product(self, q, k, v):
        q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
        return ((q.transpose(-2, -1) @ k).softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)


class Outlook(Attention):
    """Maps that a layer makes of each token, without queries and keys (VOLO)."""

    def parts(self):
        self.maps, self.v = nn.Linear(WIDTH, HEADS * TOKENS), nn.Linear(WIDTH, WIDTH)

    def attend(self, x):
        b, n, c = x.shape
        maps = self.maps(x).reshape(b, n, HEADS, TOKENS).permute(0, 2, 1, 3).softmax(-1)
        v = self.v(x).view(b, n, HEADS, DIM).transpose(1, 2)
        return (maps @ v).transpose(1, 2).flatten(2)


ALL = [
    Packed, Explicit, Table, TableAsMask, Talking, Normed, Rotary, Apart, Einsum, Module, Crossed,
    Outlook,
]  # fmt: skip


def pruned(cls: type[Attention], **options):
    """A network of random weights and what `prune` makes of it, checked against the oracle."""
    torch.manual_seed(0)
    model = randomise(cls())
    x = torch.randn(2, TOKENS, 5, dtype=torch.float64)
    small = fxprune.prune(model, x, criterion="l2", rate=0.5, **options)
    other = torch.randn(3, TOKENS, 5, dtype=torch.float64)
    if "normalised" not in small.fxprune.report.verification.reference:
        expected = masked(model, small.fxprune.plan.kept)(other)
        assert torch.allclose(small(other), expected, rtol=1e-9, atol=1e-12)
    assert small(other).shape == model(other).shape
    return small


def width(small: nn.Module, layer: str) -> int:
    name = "attention.in_proj_weight" if layer == "in" else f"{layer}.weight"
    return len(small.get_parameter(name))


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("heads", ["dims", "whole", "keep"])
def test_every_way_is_exact(cls, heads):
    small = pruned(cls, heads=heads)
    assert small.fxprune.plan.heads == heads
    assert width(small, "embed") == WIDTH // 2 and width(small, "up") == 16


MADE = {Apart: "q k v", Module: "in", Outlook: "v"}


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_whole_heads_go(cls):
    small = pruned(cls, heads="whole")
    for layer in MADE.get(cls, "qkv").split():
        full = {"q": 40, "k": 40, "v": WIDTH}.get(layer, 3 * WIDTH)
        assert width(small, layer) == full // 2
    left = {
        Table: ("table", (20, 2)),
        TableAsMask: ("table", (20, 2)),
        Normed: ("q_norm.weight", (DIM,)),
        Talking: ("after.weight", (2, 2)),
    }
    if cls in left:
        name, shape = left[cls]
        assert tuple(small.get_parameter(name).shape) == shape


STAY = (Rotary, Crossed)  # a constant, or a softmax, along the dims of packed heads


@pytest.mark.parametrize("cls", [c for c in ALL if c not in STAY], ids=lambda cls: cls.__name__)
def test_dims_of_every_head_go(cls):
    small = pruned(cls)
    for layer in MADE.get(cls, "qkv").split():
        full = {"q": 40, "k": 40, "v": WIDTH}.get(layer, 3 * WIDTH)
        assert width(small, layer) == full // 2
    assert small.proj.in_features == WIDTH // 2


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_heads_are_kept(cls):
    small = pruned(cls, heads="keep")
    for layer in MADE.get(cls, "qkv").split():
        assert width(small, layer) == {"q": 40, "k": 40, "v": WIDTH}.get(layer, 3 * WIDTH)
    reasons = [row.reason for row in small.fxprune.report.shortfalls()]
    assert any("heads='keep'" in reason for reason in reasons)


def test_the_scale_is_the_originals():
    """The fused product's default scale hides the width of a head, which is another now."""
    small = pruned(Packed)
    (call,) = [n for n in small.graph.nodes if n.target is F.scaled_dot_product_attention]
    assert call.kwargs["scale"] == DIM**-0.5
    whole = pruned(Packed, heads="whole")
    (call,) = [n for n in whole.graph.nodes if n.target is F.scaled_dot_product_attention]
    assert "scale" not in call.kwargs


@pytest.mark.parametrize("heads", ["dims", "whole"])
def test_another_batch_runs(heads):
    for cls in (Module, Packed):
        small = pruned(cls, heads=heads)
        for batch in (1, 5):
            assert small(torch.randn(batch, TOKENS, 5, dtype=torch.float64)).shape == (batch, 3)


def test_a_plan_remembers_its_heads():
    torch.manual_seed(0)
    model, x = randomise(Table()), torch.randn(2, TOKENS, 5, dtype=torch.float64)
    plan = fxprune.plan(fxprune.analyze(model, x, heads="whole"), rate=0.5)
    again = fxprune.apply(model, fxprune.Plan.from_json(plan.to_json()))
    assert tuple(again.get_parameter("table").shape) == (20, 2)


def test_an_unknown_word_is_refused():
    with pytest.raises(fxprune.errors.OptionError, match="heads"):
        fxprune.analyze(Packed(), torch.randn(2, TOKENS, 5), heads="all")


class Cosine(Packed):
    """Queries and keys of length one, a scale a head (Swin V2)."""

    def parts(self):
        super().parts()
        self.scale = nn.Parameter(torch.randn(HEADS, 1, 1))

    def product(self, q, k, v):
        maps = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (maps * self.scale).softmax(-1) @ v


class Lengths(Packed):
    """The same by hand: each query by the sum and the mean of its squares."""

    def product(self, q, k, v):
        q = q / q.square().sum(-1, keepdim=True).sqrt()
        k = k / k.square().mean(-1, keepdim=True).sqrt()
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.mark.parametrize("cls", [Cosine, Lengths])
@pytest.mark.parametrize("heads", ["dims", "whole"])
def test_lengths_of_heads_are_exact(cls, heads):
    small = pruned(cls, heads=heads)
    assert width(small, "qkv") == 3 * WIDTH // 2


class Zeroed(Cosine):
    """Keys without a bias, which is set to zero in a part of a copy (Swin V2 of torchvision)."""

    def attend(self, x):
        b, n, c = x.shape
        bias = self.qkv.bias.clone()
        third = bias.numel() // 3
        bias[third : 2 * third].zero_()
        packed = F.linear(x, self.qkv.weight, bias).reshape(b, n, 3, HEADS, DIM)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return self.product(q, k, v).transpose(1, 2).reshape(b, n, c)


@pytest.mark.parametrize("heads", ["dims", "whole"])
def test_a_part_of_a_weight_is_changed_in_place(heads):
    small = pruned(Zeroed, heads=heads)
    assert width(small, "qkv") == 3 * WIDTH // 2


class Distances(Packed):
    """Rows of a table for each pair of tokens, met by the queries (MViT, decomposed positions)."""

    def parts(self):
        super().parts()
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, DIM))
        at = torch.arange(TOKENS)
        self.register_buffer("distance", at[:, None] - at + TOKENS - 1)

    def product(self, q, k, v):
        near = torch.einsum("bhqd,qkd->bhqk", q, self.table[self.distance])
        return (q @ k.transpose(-2, -1) + near).softmax(-1) @ v


@pytest.mark.parametrize("cls", [Table, TableAsMask, Distances], ids=lambda cls: cls.__name__)
def test_a_table_of_positions_leaves_no_ids_of_pairs(cls):
    torch.manual_seed(0)
    found = fxprune.analyze(randomise(cls()), torch.randn(2, TOKENS, 5, dtype=torch.float64))
    layers = [la for v in found.flow.values.values() for la in getattr(v, "layers", ())]
    assert all(la.ids.numel() < TOKENS**2 for la in layers)
    (stays,) = [f for f in found.flow.ids.frozen if "looks up" in f.reason]
    assert stays.ids.numel() == found.tensors["table"].shape[0]
    pruned(cls)
