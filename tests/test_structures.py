"""Hard structures: each is pruned exactly, or left alone for a reason that the report gives.

A case is a small network with the widths that a right pruner leaves at rate 0.5. Exactness is
judged by `zoo_small`, which knows nothing of fxprune but the kept indices in the plan.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_small import (
    ODD,
    Case,
    Shape,
    assert_exact,
    conv,
    gap,
    image,
    masked,
    net,
    par,
    randomise,
    real,
    reasons,
    run,
    tensor,
    widths,
)

import fxprune

CASES: dict[str, Case] = {}


def structure(*inputs: Any, **options: Any):
    return net(*inputs, into=CASES, **options)


# A network's parts stand in one paragraph, not one a line.
# fmt: off


# -- the same channels twice -----------------------------------------------------------------------


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(16, 6), o=conv(6, 2))
def cat_with_itself(m, x):
    x = m.a(x)
    return m.o(m.b(torch.cat([x, x], 1)))


@structure(
    image(), half="a 4, b 4, bn 12, c 3", a=conv(3, 8), b=conv(8, 8), bn=nn.BatchNorm2d(24),
    c=conv(24, 6), o=conv(6, 2),
)
def nested_cat_with_copies(m, x):
    x = m.a(x)
    y = torch.cat([x, F.gelu(m.b(x))], 1)
    return m.o(m.c(m.bn(torch.cat([x, y], 1))))


@structure(image(), image(), half="a 4, b 3", a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
def one_conv_two_inputs(m, x, y):
    return m.o(m.b(m.a(x) + m.a(y)))


@structure(image(), half="a 4, b 4", a=conv(3, 8), b=conv(8, 8), o=conv(8, 2))
def one_conv_in_a_loop(m, x):
    x = m.a(x)
    for _ in range(3):
        x = F.relu(m.b(x))
    return m.o(x)


@structure(
    image(), half="a 4, b 4, c 3, d 3", a=conv(3, 8), b=conv(3, 8), c=conv(8, 6), d=conv(8, 6),
    o=conv(6, 2),
)
def one_weight_two_convs(m, x):
    return m.o(m.c(m.a(x)) + m.d(m.b(x)))


CASES["one_weight_two_convs"].parts["b"].weight = CASES["one_weight_two_convs"].parts["a"].weight


# -- positions that the network computes -----------------------------------------------------------


def _tokens(m, x):
    """Tokens and the positions of those with the largest of three scores."""
    x = m.a(x).flatten(2).transpose(1, 2)
    return x, m.score(x).amax(-1).topk(5, dim=1)[1]


@structure(
    image(), half="a 4, b 3", a=conv(3, 8), score=nn.Linear(8, 3),
    b=nn.Linear(8, 6), o=nn.Linear(6, 2),
)
def tokens_gathered(m, x):
    x, best = _tokens(m, x)
    return m.o(m.b(torch.gather(x, 1, best.unsqueeze(-1).expand(-1, -1, 8))))


@structure(
    image(), half="a 4, b 3", a=conv(3, 8), score=nn.Linear(8, 3),
    b=nn.Linear(8, 6), o=nn.Linear(6, 2),
)
def tokens_gathered_by_repeats(m, x):
    x, best = _tokens(m, x)
    return m.o(m.b(x.gather(dim=1, index=best[:, :, None].repeat(1, 1, x.shape[-1]))))


@structure(
    image(), half="a 4, b 3", a=conv(3, 8), score=nn.Linear(8, 3),
    b=nn.Linear(8, 6), o=nn.Linear(6, 2),
)
def tokens_gathered_by_a_number_of_repeats(m, x):
    x, best = _tokens(m, x)
    return m.o(m.b(x.gather(1, best[:, :, None].repeat(1, 1, 8))))


@structure(
    image(), half="a 4, b 3", a=conv(3, 8), score=nn.Linear(8, 3),
    b=nn.Linear(8, 6), o=nn.Linear(6, 2),
)
def tokens_indexed(m, x):
    x, best = _tokens(m, x)
    return m.o(m.b(x[torch.arange(x.shape[0])[:, None], best]))


@structure(
    image(), half="a 4, b 3", a=conv(3, 8), score=nn.Linear(8, 3),
    b=nn.Linear(8, 6), o=nn.Linear(6, 2),
)
def tokens_selected(m, x):
    x, best = _tokens(m, x)
    return m.o(m.b(x.index_select(1, best[0])))


@structure(
    image(), image(), half="a 8, b 3", frozen="is picked by computed positions", a=conv(3, 8),
    b=conv(3, 6), o=conv(6, 2),
)
def channels_indexed_by_what_is_computed(m, x, y):
    return m.o(m.b(m.a(x)[:, y[0, 0, 0].topk(3)[1]]))


@structure(image(), image(), half="a 4, b 3", a=conv(3, 8), b=conv(3, 6), o=conv(6, 2))
def channels_gathered(m, x, y):
    return m.o(m.b(m.a(x).gather(1, y.argsort(dim=1))))


@structure(
    image(), half="a 8, b 3", frozen="meets `index`, which has no channels", a=conv(3, 8),
    b=conv(8, 6), o=conv(6, 2),
)
def positions_that_differ_by_channel(m, x):
    x = m.a(x)
    where = (torch.arange(8 * 5) % 7).view(1, 8, 1, 5).expand(x.shape[0], -1, x.shape[2], -1)
    return m.o(m.b(x.gather(3, where)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
def positions_of_the_same_channels(m, x):
    x = m.a(x).flatten(2)
    return m.o(m.b(x.gather(2, x.topk(4, dim=2)[1])[..., None]))


@structure(
    image(), image(), half="a 8, b 4, c 3", frozen="is `index` of getitem", a=conv(3, 8),
    b=conv(3, 8), c=conv(8, 6), o=conv(6, 2),
)
def channels_read_as_positions(m, x, y):
    rows = m.a(x).amax((0, 2, 3)).long() % 2
    return m.o(m.c(m.b(y)[rows]))


# -- split, chunk, gates ---------------------------------------------------------------------------


@structure(image(), half="a 6, b 3, c 3", a=conv(3, 12), b=conv(4, 6), c=conv(8, 6), o=conv(6, 2))
def split_literal(m, x):
    p, q = torch.split(m.a(x), [4, 8], 1)
    return m.o(m.b(p) + m.c(q))


@structure(image(), half="a 4, b 3, c 3", a=conv(3, 8), b=conv(4, 6), c=conv(4, 6), o=conv(6, 2))
def slices_by_tensors(m, x):
    x = m.a(x)
    cut = torch.tensor(x.shape, device=x.device)[1] // 2
    return m.o(m.b(x[:, :cut]) + m.c(x[:, cut:]))


@structure(image(), half="a 4, b 2", a=conv(3, 8), b=conv(4, 4), o=conv(4, 2))
def chunk_gate(m, x):
    p, q = m.a(x).chunk(2, 1)
    return m.o(m.b(p * torch.sigmoid(q)))


@structure(image(), half="a 4, b 2", a=conv(3, 8), b=conv(4, 4), o=conv(4, 2))
def chunk_add(m, x):
    p, q = m.a(x).chunk(2, 1)
    return m.o(m.b(p + q))


@structure(image(), half="a 4, b 2", a=conv(3, 8), b=conv(4, 4), o=conv(4, 2))
def functional_glu(m, x):
    return m.o(m.b(F.glu(m.a(x), dim=1)))


@structure(image(), half="a 4, b 2", a=conv(3, 8), g=nn.GLU(1), b=conv(4, 4), o=conv(4, 2))
def module_glu(m, x):
    return m.o(m.b(m.g(m.a(x))))


@structure(image(), half="a 6, b 2, c 2", a=conv(3, 12), b=conv(6, 4), c=conv(4, 4), o=conv(4, 2))
def split_cat_again(m, x):
    p, q = torch.split(m.a(x), (6, 6), dim=1)
    return m.o(m.c(m.b(torch.cat([q], 1)) + m.b(p)))


@structure(
    image(), half="a 20, b 4, c 4", a=conv(3, 40), b=conv(10, 8), c=conv(20, 8), o=conv(8, 2),
)
def one_block_for_two_pieces(m, x):
    p, q, r = torch.split(m.a(x), [10, 10, 20], dim=1)
    return m.o(m.b(p) + m.b(q) + m.c(r))


@structure(image(), half="a 8, b 2, c 3", a=conv(3, 16), b=conv(4, 4), c=conv(16, 6), o=conv(6, 2))
def partial_conv(m, x):
    p, q = torch.split(m.a(x), [4, 12], dim=1)
    return m.o(m.c(torch.cat((m.b(p), q), 1)))


class C2f(nn.Module):
    """Chunk in two, a list that grows by blocks with shortcuts, one concatenation."""

    def __init__(self, width: int = 4, blocks: int = 2):
        super().__init__()
        self.first, self.last = conv(3, 2 * width, 1), conv((2 + blocks) * width, 6, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(width, width), nn.SiLU(), conv(width, width)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        y.extend(y[-1] + block(y[-1]) for block in self.blocks)
        return self.last(torch.cat(y, 1))


@structure(
    image(), half="f.first 4, f.blocks.0.0 2, f.blocks.0.2 2, f.blocks.1.0 2, f.last 3", f=C2f(),
    o=conv(6, 2),
)
def growing_list(m, x):
    return m.o(m.f(x))


@structure(
    image(), half="a 4, b 2, c 2, d 3", a=conv(3, 8), b=conv(4, 4), c=conv(4, 4), d=conv(16, 6),
    o=conv(6, 2),
)
def nested_growing_list(m, x):
    """CSP within ELAN: pieces of a chunk, blocks on blocks, a list of all"""
    y = list(m.a(x).chunk(2, 1))
    for block in (m.b, m.c):
        y.append(block(y[-1]) * 0.5)
    return m.o(m.d(torch.cat(y, 1)))


@structure(
    image(), half="a 8, b 4, c 2, d 2", a=conv(3, 16), b=conv(16, 8), c=conv(8, 4), d=conv(8, 4),
    e=conv(16, 2),
)
def uneven_cat(m, x):
    """branches of 8, 4 and 4 meet a sum with 16"""
    x = m.a(x)
    y = m.b(x)
    return m.e(x + torch.cat([y, m.c(y), m.d(y)], 1))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(11, 6), o=conv(6, 2))
def cat_with_the_input(m, x):
    return m.o(m.b(torch.cat([m.a(x), x], 1)))


@structure(
    tensor(2, 6), half="a 2, b 4, c 8", a=nn.Linear(6, 3), b=nn.Linear(6, 8), c=nn.Linear(8, 16),
    d=nn.Linear(16, 1), e=nn.Linear(4, 5), o=nn.Linear(5, 2),
)
def two_heads_in_one_cat(m, x):
    y = m.d(F.relu(m.c(F.relu(m.b(x)))))
    return m.o(m.e(torch.cat([m.a(x), y], -1)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
def cat_of_rows(m, x):
    x = m.a(x)
    return m.o(m.b(torch.cat([x, x.flip(2)], 2)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(4, 6), o=conv(6, 2))
def half_is_dropped(m, x):
    return m.o(m.b(m.a(x)[:, :4]))


# -- shuffles and index maps -----------------------------------------------------------------------


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.size()
    x = x.view(n, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(n, c, h, w)


@structure(image(), half="a 4, b 4", a=conv(3, 8), b=conv(8, 8), o=conv(8, 2))
def shuffle_by_hand(m, x):
    return m.o(m.b(shuffled(m.a(x), 2)))


@structure(
    image(), half="a 6, b 4", a=conv(3, 12), s=nn.ChannelShuffle(3), b=conv(12, 8), o=conv(8, 2),
)
def shuffle_module(m, x):
    return m.o(m.b(m.s(m.a(x))))


@structure(image(), half="a 6, b 4", a=conv(3, 12), b=conv(12, 8), o=conv(8, 2))
def shuffle_reshape(m, x):
    x = m.a(x)
    n, c = x.shape[:2]
    x = x.reshape(n, 3, -1, *x.shape[2:]).transpose(1, 2).reshape(n, -1, *x.shape[2:])
    return m.o(m.b(x))


@structure(
    image(), half="a 6, b 6, d 6, c 4", a=conv(3, 12), b=conv(12, 12, groups=3),
    d=conv(12, 12, groups=12), c=conv(12, 8, groups=2), o=conv(8, 2),
)
def shuffle_between_grouped(m, x):
    x = m.d(shuffled(m.b(m.a(x)), 3))
    return m.o(m.c(x))


@structure(
    image(), half="a 6, b 12, c 4", frozen="keeps equal counts", a=conv(3, 12),
    b=conv(12, 12, groups=3), c=conv(12, 8, groups=4), o=conv(8, 2),
)
def no_even_choice(m, x):
    """equal counts in 3 blocks of 4 and in 4 blocks of 3: all twelve or none"""
    return m.o(m.c(shuffled(m.b(m.a(x)), 3)))


@structure(
    image(), half="a 8, b 4, d 4, c 4", a=conv(3, 16), b=conv(8, 8, 1), d=conv(8, 8, groups=8),
    c=conv(8, 8, 1), o=conv(16, 2),
)
def shuffle_unit(m, x):
    """ShuffleNet V2, stride 1: one half passes, the other works, both are shuffled; three times"""
    x = m.a(x)
    for _ in range(3):
        p, q = x.chunk(2, dim=1)
        x = shuffled(torch.cat((p, m.c(m.d(m.b(q)))), dim=1), 2)
    return m.o(x)


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
def flipped_channels(m, x):
    return m.o(m.b(torch.flip(m.a(x), [1])))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
def rolled_channels(m, x):
    return m.o(m.b(m.a(x).roll(3, 1)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
def rolled_rows(m, x):
    return m.o(m.b(torch.roll(m.a(x), (1, 2), (2, 3))))


@structure(
    image(), half="a 4, b 3", a=conv(3, 8), b=conv(4, 6), o=conv(6, 2),
    index=torch.tensor([6, 0, 3, 5]),
)
def index_selected(m, x):
    return m.o(m.b(torch.index_select(m.a(x), 1, m.index)))


@structure(
    image(), half="a 4, b 3", a=conv(3, 8), b=conv(8, 6), o=conv(6, 2),
    index=torch.tensor([6, 0, 3, 5, 1, 2, 7, 4]),
)
def permuted_by_buffer(m, x):
    return m.o(m.b(m.a(x)[:, m.index]))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(4, 6), o=conv(6, 2))
def strided_slice(m, x):
    return m.o(m.b(m.a(x)[:, ::2]))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(16, 6), o=conv(6, 2))
def repeated(m, x):
    return m.o(m.b(m.a(x).repeat(1, 2, 1, 1)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(16, 6), o=conv(6, 2))
def repeat_interleaved(m, x):
    return m.o(m.b(m.a(x).repeat_interleave(2, 1)))


@structure(image(), half="a 4, b 4, c 3", a=conv(3, 8), b=conv(3, 8), c=conv(16, 6), o=conv(6, 2))
def stacked_and_flattened(m, x):
    """two branches interleaved channel by channel"""
    return m.o(m.c(torch.stack([m.a(x), m.b(x)], 2).flatten(1, 2)))


@structure(image(), half="a 4, b 4, c 3", a=conv(3, 8), b=conv(3, 8), c=conv(8, 6), o=conv(6, 2))
def stacked_and_summed(m, x):
    return m.o(m.c(torch.stack([m.a(x), m.b(x)]).sum(0)))


@structure(image(), half="a 4, b 8", a=conv(3, 8), b=conv(3, 16, stride=2), o=conv(16, 2))
def option_a_shortcut(m, x):
    """ResNet's shortcut without weights: every second pixel, zeros for the new channels"""
    y = F.pad(m.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
    return m.o(F.relu(m.b(x) + y))


# -- shapes ----------------------------------------------------------------------------------------


@structure(image(), half="a 4, l 3", a=conv(3, 8), l=nn.Linear(8 * 16, 6), o=nn.Linear(6, 2))
def flatten_to_linear(m, x):
    return m.o(m.l(torch.flatten(F.max_pool2d(m.a(x), 2), 1)))


@structure(image(), half="a 4, l 3", a=conv(3, 8), l=nn.Linear(8 * 64, 6), o=nn.Linear(6, 2))
def flatten_channels_last(m, x):
    return m.o(m.l(m.a(x).permute(0, 2, 3, 1).flatten(1)))


@structure(image(), half="a 4, l 3", a=conv(3, 8), l=nn.Linear(8 * 16, 6), o=nn.Linear(6, 2))
def view_baked(m, x):
    return m.o(m.l(F.max_pool2d(m.a(x), 2).view(-1, 8 * 16)))


@structure(image(), half="a 4, l 3", a=conv(3, 8), l=nn.Linear(64, 6), o=nn.Linear(6 * 8, 2))
def reshape_baked(m, x):
    x = m.a(x)
    return m.o(m.l(x.reshape(x.shape[0], 8, -1)).flatten(1))


@structure(
    image(3, 32), half="a 8, b 4, l 5", a=conv(3, 16, 5, stride=2), b=conv(16, 8),
    p=nn.AdaptiveAvgPool2d((6, 6)), l=nn.Linear(8 * 6 * 6, 10), o=nn.Linear(10, 2),
)
def alexnet_view(m, x):
    x = m.p(m.b(F.relu(m.a(x))))
    return m.o(m.l(F.dropout(x.view(x.size(0), 8 * 6 * 6), 0.5, m.training)))


@structure(
    image(3, 16), half="a 8, bn 8, l 6", a=conv(3, 16), bn=nn.BatchNorm2d(16),
    p=nn.AdaptiveAvgPool2d(5), f=nn.Flatten(), l=nn.Linear(16 * 25, 12), o=nn.Linear(12, 2),
)
def pool_flatten_linear(m, x):
    return m.o(m.l(m.f(m.p(m.bn(m.a(x))))))


@structure(
    tensor(2, 1, 4), half="a 64, b 32, c 16", a=nn.Conv1d(1, 128, 3, padding=1),
    b=nn.Conv1d(128, 64, 3, padding=1), c=nn.Conv1d(64, 32, 3, padding=1), o=nn.Linear(32 * 4, 2),
)
def conv1d_stack(m, x):
    return m.o(torch.flatten(F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))), 1))


@structure(tensor(2, 6), half="l 64, a 3", l=nn.Linear(6, 8 * 16), a=conv(8, 6), o=conv(6, 2))
def linear_to_picture(m, x):
    return m.o(m.a(m.l(x).view(x.shape[0], 8, 4, 4)))


@structure(
    tensor(2, 20), half="l 128, a 8, b 4", l=nn.Linear(20, 256),
    a=nn.ConvTranspose2d(16, 8, 4, 2, 1), b=nn.ConvTranspose2d(8, 4, 4, 2, 1), o=conv(4, 2),
)
def generator(m, x):
    """a transposed convolution's weight leads with its input"""
    return m.o(m.b(F.relu(m.a(F.relu(m.l(x).view(-1, 16, 4, 4))))))


@structure(
    tensor(4, 2), half="a 8, b 16, c 8", a=nn.Linear(2, 16), b=nn.Linear(16, 32),
    c=nn.Linear(32, 16), o=nn.Linear(16, 2),
)
def linears_with_a_reshape(m, x):
    x = F.relu(m.b(F.relu(m.a(x)))).reshape(-1, 32)
    return m.o(F.relu(m.c(x)))


@structure(image(), half="a 8", a=conv(3, 16), h=conv(16, 3 * 5), frozen="output")
def ssd_head(m, x):
    y = m.h(F.relu(m.a(x)))
    n, _, h, w = y.shape
    return y.reshape(n, -1, 5, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 5)


@structure(image(), half="a 4, s 4", a=conv(3, 8), s=par(8), o=conv(8, 2))
def shape_in_an_attribute(m, x):
    shape = (8, 1, 1)
    return m.o(m.a(x) * m.s.view(shape))


@structure(
    tensor(2, 5, 12), half="qkv 18, p 6", qkv=nn.Linear(12, 36), p=nn.Linear(12, 12),
    o=nn.Linear(12, 2),
)
def heads_baked(m, x):
    n, l, _ = x.shape
    q, k, v = m.qkv(x).reshape(n, l, 3, 3, 4).permute(2, 0, 3, 1, 4)
    a = (q @ k.transpose(-2, -1) * 0.5).softmax(-1)
    return m.o(m.p((a @ v).transpose(1, 2).reshape(n, l, 12)))


@structure(
    tensor(2, 5, 12), half="q 12, k 4, v 4, p 6", q=nn.Linear(12, 24), k=nn.Linear(12, 8),
    v=nn.Linear(12, 8), p=nn.Linear(24, 12), o=nn.Linear(12, 2),
)
def grouped_queries(m, x):
    """six query heads share two key and value heads"""
    n, l, _ = x.shape
    q = m.q(x).view(n, l, 6, 4).transpose(1, 2)
    k = m.k(x).view(n, l, 2, 4).transpose(1, 2).repeat_interleave(3, dim=1)
    v = m.v(x).view(n, l, 2, 4).transpose(1, 2).repeat_interleave(3, dim=1)
    y = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
    return m.o(m.p(y.transpose(1, 2).reshape(n, l, -1)))


# -- groups ----------------------------------------------------------------------------------------


@structure(image(), half="a 4, b 6, o 2", a=conv(3, 8), b=conv(8, 12, groups=2), o=conv(12, 2))
def grouped(m, x):
    return m.o(m.b(m.a(x)))


@structure(
    image(), half="a 6, b 6, c 6", a=conv(3, 12), b=conv(12, 12, groups=2),
    c=conv(12, 12, groups=3), o=conv(12, 2),
)
def grouped_twice(m, x):
    return m.o(m.c(m.b(m.a(x))))


@structure(
    image(), half="a 8, b 4, d 4, c 4", a=conv(3, 16), b=conv(16, 8, groups=4),
    d=conv(16, 8, groups=2), c=conv(8, 8, groups=2), o=conv(8, 2),
)
def grouped_readers(m, x):
    x = m.a(x)
    return m.o(m.c(m.b(x) + m.d(x)))


@structure(
    image(), half="a 4, d 8, b 3", a=conv(3, 8), d=conv(8, 16, groups=8), b=conv(16, 6, 1),
    o=conv(6, 2),
)
def depthwise_multiplier(m, x):
    return m.o(m.b(m.d(m.a(x))))


@structure(
    image(), half="a 4, d 4, b 3", a=conv(3, 8), d=conv(8, 8, groups=8), bn=nn.BatchNorm2d(8),
    b=conv(8, 6, 1), o=conv(6, 2),
)
def depthwise(m, x):
    return m.o(m.b(F.relu6(m.bn(m.d(m.a(x))))))


@structure(
    image(), half="a 8, b 16, c 1", a=conv(3, 16), b=conv(16, 32), c=conv(32, 1), o=conv(1, 2),
)
def one_output_channel(m, x):
    return m.o(F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))))


@structure(
    image(), half="a 4, b 6, o 2", a=conv(3, 8), t=nn.ConvTranspose2d(8, 12, 3, 2, 1),
    b=conv(12, 12), o=conv(12, 2),
)
def transposed(m, x):
    return m.o(m.b(m.t(m.a(x))))


@structure(
    image(), half="a 4, t 4, b 3", a=conv(3, 8), t=nn.ConvTranspose2d(8, 12, 3, groups=2),
    b=conv(12, 6), o=conv(6, 2),
)
def transposed_grouped(m, x):
    return m.o(m.b(m.t(m.a(x))))


@structure(
    tensor(2, 3, 4, 6, 6), half="a 4, b 3", a=nn.Conv3d(3, 8, 3), bn=nn.BatchNorm3d(8),
    b=nn.Conv3d(8, 6, 1), o=nn.Conv3d(6, 2, 1),
)
def volumes(m, x):
    return m.o(m.b(F.max_pool3d(m.bn(m.a(x)), (1, 2, 2))))


@structure(
    image(), half="a 2, b 4, c 4", a=conv(3, 4), b=conv(3, 8), c=conv(12, 8, groups=2),
    o=conv(8, 2),
)
def grouped_reader_straddles_a_cat(m, x):
    """blocks of 6 over branches of 4 and 8: the second block ends the first branch's"""
    return m.o(m.c(torch.cat([m.a(x), m.b(x)], 1)))


# -- pixels and channels ---------------------------------------------------------------------------


@structure(
    image(), half="a 16, b 3", a=conv(3, 32), s=nn.PixelShuffle(2), b=conv(8, 6), o=conv(6, 2),
)
def pixel_shuffle(m, x):
    return m.o(m.b(m.s(m.a(x))))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(32, 6), o=conv(6, 2))
def pixel_unshuffle(m, x):
    return m.o(m.b(F.pixel_unshuffle(m.a(x), 2)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(32, 6), o=conv(6, 2))
def space_to_depth(m, x):
    x = m.a(x)
    n, c, h, w = x.size()
    x = (
        x.view(n, c, h // 2, 2, w // 2, 2)
        .permute(0, 3, 5, 1, 2, 4)
        .contiguous()
        .view(n, c * 4, h // 2, w // 2)
    )
    return m.o(m.b(x))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(32, 6), o=conv(6, 2))
def focus_slices(m, x):
    x = m.a(x)
    corners = [x[..., i::2, j::2] for j in range(2) for i in range(2)]
    return m.o(m.b(torch.cat(corners, 1)))


# -- gates and broadcasts --------------------------------------------------------------------------


@structure(
    image(), half="a 4, r 2, e 4", a=conv(3, 8), r=conv(8, 4, 1), e=conv(4, 8, 1), o=conv(8, 2),
)
def squeeze_excite_convs(m, x):
    x = m.a(x)
    return m.o(x * m.e(F.relu(m.r(F.adaptive_avg_pool2d(x, 1)))).sigmoid())


@structure(
    image(), half="a 4, r 2, e 4", a=conv(3, 8), r=nn.Linear(8, 4), e=nn.Linear(4, 8),
    p=nn.AdaptiveAvgPool2d(1), o=conv(8, 2),
)
def squeeze_excite_linears(m, x):
    x = m.a(x)
    n, c, _, _ = x.size()
    gate = m.e(F.relu(m.r(m.p(x).view(n, c)))).sigmoid().view(n, c, 1, 1)
    return m.o(x * gate.expand_as(x))


@structure(image(), half="a 4, g 1, b 3", a=conv(3, 8), g=conv(3, 1), b=conv(8, 6), o=conv(6, 2))
def spatial_mask(m, x):
    return m.o(m.b(torch.sigmoid(m.g(x)) * m.a(x)))


@structure(
    image(), half="a 4, g 1, c 3, b 3", a=conv(3, 8), g=conv(6, 1), c=conv(3, 6), b=conv(8, 6),
    o=conv(6, 2),
)
def spatial_mask_of_its_own(m, x):
    gate = m.g(F.relu(m.c(x))).sigmoid()
    return m.o(m.b(gate * m.a(x) + gate))


def cbam(m, x):
    x = m.a(x)
    pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return m.o(m.b(x * m.g(pooled).sigmoid()))


PARTS = dict(a=conv(3, 8), g=conv(2, 1, 7), b=conv(8, 6), o=conv(6, 2))
CASES["cbam_over_all"] = net(image(), half="a 4, b 3", **PARTS)(cbam)
CASES["cbam_over_kept"] = net(image(), half="a 4, b 3", mixing="all", **PARTS)(cbam)


@structure(image(), half="a 4, s 4", a=conv(3, 8), s=par(8, 1, 1), o=conv(8, 2))
def layer_scale(m, x):
    return m.o(m.a(x) * m.s)


@structure(
    image(), half="a 4, s 1", a=conv(3, 8), s=nn.Parameter(torch.rand(1, 8, 8, 8)), o=conv(8, 2),
)
def position_parameter(m, x):
    return m.o(m.a(x) + m.s)


@structure(image(), half="a 4, s 4", a=conv(3, 8), s=torch.rand(8), o=conv(8, 2))
def buffer_scale(m, x):
    return m.o(m.a(x) * m.s[None, :, None, None])


@structure(
    image(), half="a 4, ia 1, im 1, b 3", a=conv(3, 8), ia=par(1, 8, 1, 1), im=par(1, 6, 1, 1),
    b=conv(8, 6), o=conv(6, 2),
)
def implicit_add_and_multiply(m, x):
    return m.o(m.im * m.b(m.ia + m.a(x)))


@structure(
    image(), half="a 4, p 4, b 3, q 1", a=conv(3, 8), p=nn.PReLU(8), q=nn.PReLU(), b=conv(8, 6),
    o=conv(6, 2),
)
def prelus(m, x):
    return m.o(m.q(m.b(m.p(m.a(x)))))


@structure(image(), half="a 4", a=conv(3, 8), f=par(8), o=conv(8, 2))
def constant_before_a_padded_conv(m, x):
    return m.o(F.relu(m.a(x) + m.f.view(1, -1, 1, 1)))


# -- frozen for a reason ---------------------------------------------------------------------------


@structure(
    image(), half="a 4, m_ 3", frozen="meets a constant or an input", a=conv(3, 8), m_=conv(8, 3),
    b=conv(3, 6), o=conv(6, 2),
)
def residual_to_the_input(m, x):
    return m.o(m.b(x + m.m_(m.a(x))))


@structure(
    image(), half="a 4, b 6", frozen="reaches the network's output", a=conv(3, 8), b=conv(8, 6),
    o=conv(6, 2),
)
def inner_value_is_an_output(m, x):
    y = m.b(m.a(x))
    return m.o(F.relu(y)), y


@structure(
    image(), half="a 8, b 6, c 3", frozen="reaches the network's output", a=conv(3, 8),
    b=conv(8, 6), c=conv(6, 6), o=conv(6, 2),
)
def nested_outputs(m, x):
    x = m.a(x)
    y = m.b(x)
    return {"pyramid": [x, (y * 2,)], "head": {"logits": m.o(m.c(y))}}


@structure(
    image(), half="a 8, b 3", frozen="softmax at %softmax mixes channels", a=conv(3, 8),
    b=conv(8, 6), o=conv(6, 2),
)
def channel_softmax(m, x):
    return m.o(m.b(m.a(x).softmax(1)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(1, 6), o=conv(6, 2))
def channel_mean(m, x):
    """a mean divides by the original's count"""
    return m.o(m.b(m.a(x).mean(1, keepdim=True)))


@structure(
    image(), half="a 8, b 3", frozen="mean at %mean mixes channels", a=conv(3, 8), b=conv(1, 6),
    o=conv(6, 2),
)
def channel_mean_of_what_is_not_zero(m, x):
    return m.o(m.b(m.a(x).sigmoid().mean(1, keepdim=True)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(1, 6), o=conv(6, 2))
def channel_max(m, x):
    """a maximum sees the zeros of what is gone"""
    return m.o(m.b(m.a(x).amax(1, keepdim=True)))


@structure(
    image(), half="a 8, b 3", frozen="amax at %amax mixes channels", a=conv(3, 8), b=conv(1, 6),
    o=conv(6, 2),
)
def channel_max_of_what_is_not_zero(m, x):
    return m.o(m.b((m.a(x) + 1).amax(1, keepdim=True)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(2, 6), o=conv(6, 2))
def channel_best_and_where(m, x):
    """places of the largest count as in the original, gone channels included"""
    best, where = m.a(x).max(1, keepdim=True)
    return m.o(m.b(torch.cat([best, where / 7], 1)))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(3, 6), o=conv(6, 2))
def channel_top_three(m, x):
    return m.o(m.b(m.a(x).topk(3, 1)[0]))


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(1, 6), o=conv(6, 2))
def channel_deviation(m, x):
    return m.o(m.b(m.a(x).std(1, keepdim=True)))


@structure(
    image(), half="a 4", a=conv(3, 8), g=par(1, 8, 1, 1), s=par(1, 8, 1, 1), o=conv(8, 2),
)
def global_response_norm(m, x):
    """GRN of ConvNeXt V2: each channel's length by the mean length"""
    x = F.gelu(m.a(x))
    length = x.norm(2, (2, 3), keepdim=True)
    return m.o(x * length / (length.mean(1, keepdim=True) + 1e-6) * m.g + m.s + x)


@structure(image(), half="a 4, b 3", a=conv(3, 8), b=conv(1, 6), o=conv(6, 2))
def channel_sum(m, x):
    """a sum over channels is exact: what is gone was zero"""
    return m.o(m.b(m.a(x).sum(1, keepdim=True)))


@structure(
    image(), half="a 8, b 3", frozen="sum at %sum_1 mixes channels", a=conv(3, 8), b=conv(1, 6),
    o=conv(6, 2),
)
def channel_sum_of_sigmoids(m, x):
    """masked channels would count 0.5 each"""
    return m.o(m.b(m.a(x).sigmoid().sum(1, keepdim=True)))


@structure(image(), half="a 4, s 4, b 3", a=conv(3, 8), s=par(8), b=conv(8, 6), o=conv(6, 2))
def l2_norm_with_scale(m, x):
    """SSD's L2Norm: zeros add nothing to the length"""
    return m.o(m.b(F.normalize(m.a(x), dim=1) * m.s.view(1, -1, 1, 1)))


@structure(image(), half="a 4, s 4, b 3", a=conv(3, 8), s=par(8), b=conv(8, 6), o=conv(6, 2))
def l2_norm_by_hand(m, x):
    x = m.a(x)
    norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
    return m.o(m.b(torch.div(x, norm) * m.s.unsqueeze(0).unsqueeze(2).unsqueeze(3).expand_as(x)))


@structure(image(), half="a 4", a=conv(3, 8), l=nn.Linear(64, 6), o=nn.Linear(6, 2))
def gram_matrix(m, x):
    """every channel meets every other: the matrix loses rows and columns"""
    x = m.a(x).flatten(2)
    return m.o(m.l((x @ x.transpose(1, 2)).flatten(1)))


# -- statistics ------------------------------------------------------------------------------------


@structure(
    image(), half="a 4, n 4, b 3", a=conv(3, 8), n=nn.GroupNorm(4, 8), b=conv(8, 6), o=conv(6, 2),
)
def group_norm(m, x):
    return m.o(m.b(m.n(m.a(x))))


@structure(
    image(), half="a 4, n 4, b 3", a=conv(3, 8), n=nn.GroupNorm(1, 8), b=conv(8, 6), o=conv(6, 2),
)
def group_norm_of_one(m, x):
    return m.o(m.b(m.n(m.a(x))))


@structure(
    image(), half="a 4, n 4, b 3", a=conv(3, 8), n=nn.GroupNorm(8, 8), b=conv(8, 6), o=conv(6, 2),
)
def group_norm_of_singles(m, x):
    return m.o(m.b(m.n(m.a(x))))


@structure(
    image(), half="a 4, n 4, b 3", a=conv(3, 8), n=nn.InstanceNorm2d(8, affine=True), b=conv(8, 6),
    o=conv(6, 2),
)
def instance_norm(m, x):
    return m.o(m.b(m.n(m.a(x))))


@structure(
    image(), half="a 4, n 4, b 3", a=conv(3, 8), n=nn.LayerNorm(8), b=nn.Linear(8, 6),
    o=nn.Linear(6, 2),
)
def layer_norm(m, x):
    return m.o(m.b(m.n(m.a(x).permute(0, 2, 3, 1))))


@structure(
    image(), half="a 4, n 4, b 3", a=conv(3, 8), n=nn.RMSNorm(8), b=nn.Linear(8, 6),
    o=nn.Linear(6, 2),
)
def rms_norm(m, x):
    return m.o(m.b(m.n(m.a(x).permute(0, 2, 3, 1))))


@structure(
    image(), half="a 4, g 4, b 3", a=conv(3, 8), bn=nn.BatchNorm2d(8), g=conv(8, 8), b=conv(8, 6),
    o=conv(6, 2),
)
def batch_norm_betas(m, x):
    """a norm's beta keeps a zeroed channel alive unless it goes too"""
    return m.o(m.b(F.relu(m.bn(m.a(x)) + m.g(m.bn(m.a(x))))))


# -- sequences -------------------------------------------------------------------------------------


@structure(
    image(), half="a 4, l.weight_ih_l0 12", a=conv(3, 8), l=nn.LSTM(8, 5, batch_first=True),
    o=nn.Linear(5, 2),
)
def lstm_head(m, x):
    y, _ = m.l(m.a(x).mean(2).transpose(1, 2))
    return m.o(y[:, -1])


@structure(
    image(), half="a 4, l.weight_ih_l0 20, l.weight_ih_l0_reverse 20", a=conv(3, 8),
    l=nn.LSTM(8, 5, num_layers=2, bidirectional=True), o=nn.Linear(10, 2),
)
def lstm_both_ways(m, x):
    y, (h, c) = m.l(m.a(x).mean(2).permute(2, 0, 1))
    return m.o(y[-1]), h


@structure(tensor(2, 6, 5), half="a 4", a=nn.Linear(5, 8), l=nn.GRUCell(8, 5), o=nn.Linear(5, 2))
def gru_cell_in_a_loop(m, x):
    h = None
    for step in m.a(x).unbind(1):
        h = m.l(step, h)
    return m.o(h)


# -- pictures of several sizes ---------------------------------------------------------------------


@structure(
    image(3, 16), half="a 4, b 4, c 3", a=conv(3, 8), b=conv(3, 8, stride=2), c=conv(8, 6),
    o=conv(6, 2),
)
def big_little(m, x):
    big, little = m.a(x), m.b(x)
    little = F.interpolate(little, size=big.shape[2:], mode="bilinear", align_corners=False)
    return m.o(m.c(F.relu(big + little)))


class HighResolution(nn.Module):
    """Two branches of different width, each fused into the other; all upsampled and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.high, self.low = conv(6, 4), conv(6, 8, stride=2)
        self.up = nn.Sequential(conv(8, 4, 1), nn.BatchNorm2d(4), nn.Upsample(scale_factor=2))
        self.down = nn.Sequential(conv(4, 8, stride=2), nn.BatchNorm2d(8))
        self.last = conv(12, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        high, low = self.high(x), self.low(x)
        high, low = F.relu(high + self.up(low)), F.relu(low + self.down(high))
        low = F.interpolate(
            low, size=(high.size(2), high.size(3)), mode="bilinear", align_corners=True
        )
        return self.last(torch.cat([high, low], 1))


@structure(
    image(3, 16), half="h.stem 3, h.high 2, h.low 4, h.up.0 2, h.down.0 4, h.last 3",
    h=HighResolution(), o=conv(6, 2),
)
def high_resolution(m, x):
    return m.o(m.h(x))


@structure(
    image(3, 16), half="s1 4, s2 6, s3 8, l1 3, l2 3, l3 3, head 3", s1=conv(3, 8),
    s2=conv(8, 12, stride=2), s3=conv(12, 16, stride=2), l1=conv(8, 6, 1), l2=conv(12, 6, 1),
    l3=conv(16, 6, 1), head=conv(6, 6), cls=conv(6, 2), box=conv(6, 4),
)
def feature_pyramid(m, x):
    """one head for all levels, its outputs in lists"""
    c1 = m.s1(x)
    c2 = m.s2(c1)
    c3 = m.s3(c2)
    p3 = m.l3(c3)
    p2 = m.l2(c2) + F.interpolate(p3, size=c2.shape[-2:], mode="nearest")
    p1 = m.l1(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
    found = [F.relu(m.head(p)) for p in (p1, p2, p3)]
    return {
        "classes": [m.cls(f) for f in found],
        "boxes": [m.box(f).permute(0, 2, 3, 1).flatten(1, 2) for f in found],
    }


# -- weights outside of layers ---------------------------------------------------------------------


@structure(image(), half="a 4, w 3", a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8)), o=conv(6, 2))
def einsum_weight(m, x):
    return m.o(torch.einsum("nchw,oc->nohw", m.a(x), m.w))


@structure(
    image(), half="a 4, w 3, b 3", a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8, 3, 3)), b=par(6),
    o=conv(6, 2),
)
def functional_conv(m, x):
    return m.o(F.conv2d(m.a(x), m.w, m.b, padding=1))


@structure(image(), half="a 4, w 3", a=conv(3, 8), w=nn.Parameter(torch.randn(6, 8)), o=conv(6, 2))
def pointwise_conv_as_matmul(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.o(torch.matmul(m.w, x.view(n, c, -1)).view(n, -1, h, w))


@structure(
    image(), half="a 4, w 2", a=conv(3, 8), w=nn.Parameter(torch.randn(4, 6)), o=nn.Linear(6, 2),
)
def linear_by_parameter(m, x):
    x = m.a(x).permute(0, 2, 3, 1)
    return m.o(x[..., :4] @ m.w)


@structure(
    image(), half="a 4, b.parametrizations.weight.original1 3", a=conv(3, 8), b=conv(8, 6),
    o=conv(6, 2),
)
def weight_norm_by_parametrization(m, x):
    return m.o(m.b(m.a(x)))


nn.utils.parametrizations.weight_norm(CASES["weight_norm_by_parametrization"].parts["b"])
# -- attention -------------------------------------------------------------------------------------


@structure(
    image(), half="q 4, k 4, v 3, o 2", q=conv(3, 8, 1), k=conv(3, 8, 1), v=conv(3, 6, 1),
    o=conv(6, 2, 1),
)
def non_local(m, x):
    n, _, h, w = x.shape
    q, k, v = m.q(x).flatten(2), m.k(x).flatten(2), m.v(x).flatten(2)
    a = torch.bmm(q.transpose(1, 2), k).softmax(-1)
    return m.o(torch.bmm(v, a.transpose(1, 2)).view(n, -1, h, w))


@structure(
    image(), half="q 4, k 4, v 4", q=conv(8, 8, 1), k=conv(8, 8, 1), v=conv(8, 8, 1), s=conv(3, 8),
    gamma=par(1), o=conv(8, 2),
)
def attention_with_residual(m, x):
    """SAGAN: the values join the spine"""
    x = m.s(x)
    n, c, h, w = x.size()
    q = m.q(x).view(n, -1, h * w).permute(0, 2, 1)
    k = m.k(x).view(n, -1, h * w)
    v = m.v(x).view(n, -1, h * w)
    a = F.softmax(torch.bmm(q, k), dim=-1)
    return m.o(m.gamma * torch.bmm(v, a.permute(0, 2, 1)).view(n, c, h, w) + x)


@structure(
    tensor(2, 5, 12), half="b 4", a=nn.Linear(12, 12),
    m_=nn.MultiheadAttention(12, 3, batch_first=True), b=nn.Linear(12, 8), o=nn.Linear(8, 2),
)
def multihead_module(m, x):
    x = m.a(x)
    y, _ = m.m_(x, x, x, need_weights=False)
    return m.o(m.b(y))


# fmt: on


# -- the tests over all cases ----------------------------------------------------------------------

ALL = {**CASES, **ODD}


def check(case: Case, rate: float) -> Any:
    model = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pruned = assert_exact(model, case.args(), rate, mixing=case.mixing, oracle=case.oracle)
    for row in pruned.fxprune.report.groups:
        assert row.reason or row.kept == row.size - math.floor(row.size * rate + 1e-9), row
    assert case.frozen in reasons(pruned)
    return pruned


@pytest.mark.parametrize("name", ALL)
def test_half_of_the_channels_go_exactly(name):
    """Sliced equals masked, in float64, with the widths a right pruner leaves."""
    case = ALL[name]
    pruned = check(case, 0.5)
    found = widths(pruned)
    assert case.half, f"say what is expected: {found}"
    assert {key: found.get(key) for key in case.half} == case.half


@pytest.mark.parametrize("name", ALL)
def test_a_third_of_the_channels_goes_exactly(name):
    """A rate that divides nothing evenly."""
    check(ALL[name], 0.3)


# -- literals of the graph -------------------------------------------------------------------------


def pruned_case(name: str, rate: float = 0.5) -> Any:
    case = ALL[name]
    return fxprune.prune(case.build(), case.args(), criterion="l1", rate=rate, mixing=case.mixing)


def calls(pruned: Any, *names: str) -> list[Any]:
    """The nodes that call a function or method of one of these names."""
    found = []
    for node in pruned.graph.nodes:
        target = (
            node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        )
        if node.op in ("call_function", "call_method") and target in names:
            found.append(node)
    return found


def call(pruned: Any, *names: str) -> Any:
    (node,) = calls(pruned, *names)
    return node


def constant(pruned: Any, node: Any) -> list[int]:
    """The positions in a constant tensor that a node reads."""
    (read,) = [n for n in node.all_input_nodes if n.op == "get_attr"]
    return getattr(pruned, read.target).tolist()


def kept_of(pruned: Any, name: str, dim: int = 0) -> list[int]:
    return pruned.fxprune.plan.kept[name][dim]


def test_split_sizes_are_rewritten():
    pruned = pruned_case("split_literal")
    kept = kept_of(pruned, "a.weight")
    first = sum(k < 4 for k in kept)
    assert list(call(pruned, "split").args[1]) == [first, 6 - first]
    assert pruned.get_submodule("b").in_channels == first


def test_an_equal_split_becomes_a_list_where_pieces_differ():
    """Ten channels cut by fours: 4, 4 and 2; the pieces keep what was chosen in each."""
    pruned = pruned_case("split_by_int")
    kept = kept_of(pruned, "a.weight")
    sizes = [sum(low <= k < low + 4 for k in kept) for low in (0, 4, 8)]
    given = call(pruned, "split").args[1]
    if isinstance(given, int):
        assert [given] * (len(sizes) - 1) == sizes[:-1] and sizes[-1] <= given
    else:
        assert list(given) == sizes


def test_chunk_becomes_split_where_halves_differ():
    model = nn.Sequential(conv(3, 8), Chunked(), conv(6, 2))
    with torch.no_grad():
        model[0].weight[:4] *= 0.01  # what goes goes from the first half
    model = model.double().eval()
    options = {"criterion": "l1", "rate": 0.25, "scope": "global"}
    pruned = fxprune.prune(model, (image_of(3),), ignore=["1"], **options)
    assert not calls(pruned, "chunk")
    assert list(call(pruned, "split").args[1]) == [2, 4]


class Chunked(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q = conv(4, 6), conv(4, 6)

    def forward(self, x):
        p, q = x.chunk(2, 1)
        return self.p(p) + self.q(q)


def image_of(channels: int, side: int = 8, batch: int = 2) -> Tensor:
    return real(Shape((batch, channels, side, side)))


def test_a_chunk_into_equal_halves_stays():
    pruned = pruned_case("chunk_gate")
    assert calls(pruned, "chunk") and not calls(pruned, "split")


@pytest.mark.parametrize(
    ("name", "method", "sizes"),
    [
        ("view_baked", "view", (-1, 64)),
        ("alexnet_view", "view", (None, 144)),
        ("linear_to_picture", "view", (None, 4, 4, 4)),
        ("generator", "view", (-1, 8, 4, 4)),
        ("linears_with_a_reshape", "reshape", (-1, 16)),
        ("reshape_baked", "reshape", (None, 4, -1)),
        ("shape_in_an_attribute", "view", (4, 1, 1)),
    ],
)
def test_view_sizes_are_rewritten(name, method, sizes):
    """None stands for a size that the graph computes."""
    node = call(pruned_case(name), method)
    given = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    assert tuple(g if isinstance(g, int) else None for g in given) == sizes


def test_ssd_head_keeps_its_boxes():
    """Nothing of a head's literals changes: its outputs are the network's."""
    pruned = pruned_case("ssd_head")
    shapes = [n.args[1:] for n in calls(pruned, "reshape")]
    assert shapes[0][1:3] == (-1, 5) and shapes[1][1:] == (-1, 5)


def test_heads_are_rewritten():
    view = calls(pruned_case("heads_baked"), "reshape")
    assert view[0].args[3:] == (3, 3, 2) and view[1].args[3] == 6


def test_slice_bounds_are_rewritten():
    pruned = pruned_case("half_is_dropped")
    kept = kept_of(pruned, "a.weight")
    part = call(pruned, "getitem").args[1][1]
    assert part == slice(None, sum(k < 4 for k in kept), None)


def test_slice_bounds_on_both_sides():
    pruned = pruned_case("dual_path")
    kept = kept_of(pruned, "a.weight")
    bounds = [n.args[1][1] for n in calls(pruned, "getitem")]
    assert bounds[0] == slice(None, sum(k < 8 for k in kept), None)
    starts = [b.start for b in bounds if b.start is not None]
    assert sum(k < 10 for k in kept) in starts


def test_a_strided_slice_gathers():
    pruned = pruned_case("strided_slice")
    kept = kept_of(pruned, "a.weight")
    positions = constant(pruned, call(pruned, "index_select"))
    assert positions == [i for i, k in enumerate(kept) if k % 2 == 0]


@pytest.mark.parametrize("name", ["index_selected", "permuted_by_buffer"])
def test_index_buffers_are_rewritten(name):
    pruned, index = pruned_case(name), ALL[name].parts["index"].tolist()
    kept = kept_of(pruned, "a.weight")
    expected = [kept.index(i) for i in index if i in kept]
    assert constant(pruned, call(pruned, "index_select")) == expected


def test_flips_need_no_rewriting():
    pruned = pruned_case("flipped_channels")
    assert call(pruned, "flip") and not calls(pruned, "index_select")


def test_a_roll_of_channels_gathers():
    """Three places in eight are not three places in four."""
    pruned = pruned_case("rolled_channels")
    kept = kept_of(pruned, "a.weight")
    order = [(i - 3) % 8 for i in range(8)]
    assert constant(pruned, call(pruned, "index_select")) == [
        kept.index(i) for i in order if i in kept
    ]


def test_a_roll_of_rows_stays():
    assert call(pruned_case("rolled_rows"), "roll").args[1:] == ((1, 2), (2, 3))


@pytest.mark.parametrize("name", ["shuffle_by_hand", "shuffle_module", "shuffle_reshape"])
def test_a_shuffle_delivers_the_right_order(name):
    """Whether it stays a shuffle or becomes one gather: channel i of the readers is channel i."""
    pruned = pruned_case(name, rate=0.3)
    groups = 2 if name == "shuffle_by_hand" else 3
    width = ALL[name].parts["a"].out_channels
    order = torch.arange(width).view(groups, -1).t().reshape(-1).tolist()
    kept = kept_of(pruned, "a.weight")
    assert kept_of(pruned, "b.weight", 1) == [i for i, k in enumerate(order) if k in kept]


def test_pad_amounts_are_rewritten():
    pruned = pruned_case("option_a_shortcut")
    kept = kept_of(pruned, "b.weight")
    assert list(call(pruned, "pad").args[1]) == [
        0,
        0,
        0,
        0,
        sum(k < 4 for k in kept),
        sum(k >= 12 for k in kept),
    ]


def test_zeros_are_made_narrower():
    pruned = pruned_case("zero_padded_shortcut")
    got = pruned(*ALL["zero_padded_shortcut"].args())
    assert got.shape == (2, 2, 8, 8) and pruned.get_submodule("b").out_channels == 6


def test_unflattened_sizes_are_rewritten():
    pruned = pruned_case("unflatten_module")
    assert tuple(pruned.get_submodule("u").unflattened_size) == (2, 2)


def test_repeats_follow_the_channels():
    assert call(pruned_case("repeated"), "repeat").args[1:] == (1, 2, 1, 1)


def test_numbers_that_are_widths_stay_the_originals():
    """``x * x.shape[1] ** -0.5`` scales by the old width: the masked network does."""
    pruned = pruned_case("scaled_by_width")
    assert (
        gap(
            run(ALL["scaled_by_width"].build(), ALL["scaled_by_width"].args()),
            pruned(*ALL["scaled_by_width"].args()),
        )
        < 1
    )
    assert not [n for n in calls(pruned, "pow") if isinstance(n.args[0], int) and n.args[0] == 4]


def test_attributes_of_modules_are_rewritten():
    pruned = pruned_case("grouped")
    b = pruned.get_submodule("b")
    assert (b.in_channels, b.out_channels, b.groups) == (4, 6, 2)
    d = pruned_case("depthwise_multiplier").get_submodule("d")
    assert (d.in_channels, d.out_channels, d.groups) == (4, 8, 4)
    n = pruned_case("group_norm").get_submodule("n")
    assert n.num_channels == 4 and n.num_groups in (2, 4)
    assert pruned_case("layer_norm").get_submodule("n").normalized_shape == (4,)
    assert pruned_case("lstm_head").get_submodule("l").input_size == 4


# -- other sizes -----------------------------------------------------------------------------------

OTHER_SIZES = {
    "tokens_and_back": (3, 3, 6, 10),
    "patches": (3, 3, 8, 8),
    "space_to_depth": (1, 3, 12, 6),
    "shuffle_by_hand": (5, 3, 7, 9),
    "shuffle_unit": (1, 3, 5, 5),
    "view_baked": (4, 3, 8, 8),
    "linear_to_picture": (5, 6),
    "coordinates": (1, 3, 9, 5),
    "coordinate_attention": (3, 3, 10, 6),
    "big_little": (1, 3, 10, 14),
    "high_resolution": (3, 3, 8, 12),
    "feature_pyramid": (1, 3, 24, 20),
    "atrous": (1, 3, 11, 7),
    "hourglass": (1, 3, 32, 24),
    "deformed": (3, 3, 5, 9),
    "non_local": (3, 3, 4, 6),
    "squeeze_excite_linears": (5, 3, 6, 6),
    "half_slices": (3, 3, 5, 5),
    "zero_padded_shortcut": (3, 3, 5, 9),
    "conv_lstm": (1, 3, 6, 4),
    "unfold_attention": (1, 3, 6, 5),
    "frames": (3, 3, 5, 6, 6),
    "heads": (3, 7, 6),
    "grouped_queries": (3, 4, 12),
    "ssd_head": (3, 3, 5, 6),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_computed_sizes_stay_computed(name):
    """Pruned on one batch and image size, exact on another."""
    case = ALL[name]
    model = case.build()
    pruned = fxprune.prune(model, case.args(), criterion="l1", rate=0.5, mixing=case.mixing)
    reference = masked(model, pruned.fxprune.plan.kept)
    other = (real(Shape(OTHER_SIZES[name]), seed=1),)
    assert pruned.fxprune.plan.removed
    assert gap(run(reference, other), run(pruned, other)) < 1e-9


def test_a_table_longer_than_the_example_keeps_its_rows():
    """Rows that the example does not reach are no channels: a longer input reads them."""
    model = randomise(Positions())
    pruned = fxprune.prune(model, (image_of(3),), criterion="l1")
    assert pruned.pos.shape == (100, 4)
    reference = masked(model, pruned.fxprune.plan.kept)
    longer = (image_of(3, side=9),)
    assert gap(run(reference, longer), run(pruned, longer)) < 1e-9


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = conv(3, 8), nn.Linear(8, 2)
        self.pos = nn.Parameter(torch.randn(100, 8))

    def forward(self, x):
        x = self.a(x).flatten(2).transpose(1, 2)
        return self.o(x + self.pos[: x.shape[1]])


def test_a_size_made_a_plain_number_is_told():
    """``int(x.shape[0])`` cannot be computed again; the report names the line."""
    model = randomise(nn.Sequential(conv(3, 8), Flattened(), nn.Linear(512, 2)))
    pruned = assert_exact(model, (image_of(3),))
    (warning,) = pruned.fxprune.report.warnings
    assert "plain number" in warning and "test_structures.py" in warning


class Flattened(nn.Module):
    def forward(self, x):
        return x.view(int(x.size(0)), -1)


# -- every choice, not one ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name",
    "shuffle_by_hand shuffle_between_grouped grouped_twice grouped_readers flatten_channels_last "
    "repeat_interleaved stacked_and_flattened growing_list uneven_cat pixel_shuffle space_to_depth "
    "transposed_grouped grouped_reader_straddles_a_cat heads_baked shuffle_attention "
    "dual_path".split(),
)
def test_any_order_of_channels_is_exact(name, seed):
    """Other weights choose other channels; the index maps hold for them too."""
    case = ALL[name]
    model = case.build(seed=10 + seed)
    for rate in (0.2, 0.6, 0.8):
        assert_exact(model, case.args(seed), rate, mixing=case.mixing, oracle=case.oracle)


@pytest.mark.parametrize(
    "options", [{"scope": "global"}, {"round_to": 4}, {"min_channels": 3}, {"max_rate": 0.25}]
)
@pytest.mark.parametrize(
    "name", ["shuffle_unit", "growing_list", "grouped_twice", "high_resolution", "res2net"]
)
def test_options_keep_structures_exact(name, options):
    case = ALL[name]
    pruned = assert_exact(case.build(), case.args(), 0.6, **options)
    if "round_to" in options:
        wide = [m.out_channels for m in pruned.modules() if isinstance(m, nn.Conv2d)]
        old = [m.out_channels for m in case.build().modules() if isinstance(m, nn.Conv2d)]
        assert all(w % 4 == 0 or w in old for w in wide)


# -- no more tied than must be --------------------------------------------------------------------

INDEPENDENT = {
    "cat_with_itself": [("a", 8), ("b", 6)],
    "split_literal": [("a", 12), ("b", 6)],
    "chunk_gate": [("a", 4), ("b", 4)],
    "shuffle_by_hand": [("a", 8), ("b", 8)],
    "depthwise_multiplier": [("a", 8), ("b", 6)],
    "pixel_shuffle": [("a", 8), ("b", 6)],
    "spatial_mask": [("a", 8), ("b", 6)],
    "non_local": [("q", 8), ("v", 6)],
    "two_heads_in_one_cat": [("a", 3), ("b", 8), ("c", 16), ("e", 5)],
    "linear_to_picture": [("l", 8), ("a", 6)],
    "growing_list": [("f.first", 8), ("f.blocks.0.0", 4), ("f.blocks.1.0", 4), ("f.last", 6)],
    "gram_matrix": [("a", 8), ("l", 6)],
    "tied_autoencoder": [("w", 8)],
    "dual_path": [("a", 12), ("b", 6)],
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_as_many_channels_as_there_are(name):
    """Sliced == masked cannot see channels tied for nothing; their number can."""
    case = ALL[name]
    analysis = fxprune.analyze(case.build(), case.args(), mixing=case.mixing)
    found: dict[str, int] = {}
    for group in analysis.groups:
        if group.prunable:
            found[group.name] = found.get(group.name, 0) + len(group)
    assert found == dict(INDEPENDENT[name])


# -- models in other states ------------------------------------------------------------------------


def plain_net() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        conv(8, 6),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        conv(6, 2),
    )


def test_a_model_in_train_mode_stays_in_train_mode():
    model = randomise(plain_net()).train()
    model[1].eval()
    pruned = fxprune.prune(model, (image_of(3),), criterion="l1")
    assert model.training and pruned.training
    flags = {name: m.training for name, m in pruned.named_modules() if name}
    assert flags == {str(i): i != 1 for i in range(7)}
    pruned(image_of(3)).sum().backward()
    assert pruned.get_submodule("0").weight.grad.shape == (4, 3, 3, 3)


def test_functional_dropout_follows_the_flag():
    model = nn.Sequential(conv(3, 8), Dropped(), conv(8, 2)).double().train()
    pruned = fxprune.prune(model, (image_of(3),))
    x = image_of(3)
    assert not torch.equal(pruned(x), pruned(x))
    pruned.eval()
    assert torch.equal(pruned(x), pruned(x))


class Dropped(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


def test_an_inner_module_in_eval_mode_does_not_drop():
    model = nn.Sequential(conv(3, 8), Dropped(), conv(8, 2)).double().train()
    model[1].eval()
    pruned = fxprune.prune(model, (image_of(3),))
    x = image_of(3)
    assert torch.equal(pruned(x), pruned(x))


def test_hooks_are_part_of_what_is_computed():
    model = randomise(plain_net())
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[3].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    model.register_forward_hook(lambda module, args, out: out - 1)
    pruned = assert_exact(model, (image_of(3),))
    assert widths(pruned)["0"] == 4 and widths(pruned)["3"] == 3


def test_a_frozen_model_is_pruned_and_stays_frozen():
    model = randomise(plain_net())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[3].weight.requires_grad_(True)
    pruned = assert_exact(model, (image_of(3),))
    assert [name for name, p in pruned.named_parameters() if p.requires_grad] == ["3.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_survives(dtype):
    model = plain_net().to(dtype).eval()
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    pruned = fxprune.prune(model, (x,), criterion="l1")
    assert {p.dtype for p in pruned.parameters()} == {dtype} and pruned(x).dtype == dtype
    assert pruned.fxprune.report.verification.difference < 1e-9


def test_a_graph_module_is_a_model():
    """What fx made of a model can be pruned as the model can."""
    pruned = assert_exact(torch.fx.symbolic_trace(randomise(plain_net())), (image_of(3),))
    assert widths(pruned)["0"] == 4


def test_an_imported_graph():
    """As importers of ONNX files write it: weights in the root, calls of functions."""
    graph, root = torch.fx.Graph(), nn.Module()
    root.weight0, root.weight1 = (
        nn.Parameter(torch.randn(8, 3, 3, 3)),
        nn.Parameter(torch.randn(2, 8, 1, 1)),
    )
    root.register_buffer("bias0", torch.randn(8))
    x = graph.placeholder("x")
    y = graph.call_function(
        torch.conv2d, (x, graph.get_attr("weight0"), graph.get_attr("bias0")), {"padding": 1}
    )
    y = graph.call_function(torch.relu, (y,))
    graph.output(graph.call_function(torch.conv2d, (y, graph.get_attr("weight1"))))
    model = torch.fx.GraphModule(root, graph).double()
    pruned = assert_exact(model, (image_of(3),))
    assert (
        pruned.weight0.shape[0] == 4 and pruned.bias0.shape[0] == 4 and pruned.weight1.shape[1] == 4
    )


def test_an_exported_program_is_a_model():
    exported = torch.export.export(randomise(plain_net()), (image_of(3),)).module()
    assert widths(assert_exact(exported, (image_of(3),)))["0"] == 4


def test_pruned_again():
    once = fxprune.prune(randomise(plain_net()), (image_of(3),), criterion="l1", rate=0.25)
    twice = assert_exact(once, (image_of(3),), 0.5)
    assert widths(twice)["0"] == 3 and widths(twice)["3"] == 3


def test_one_module_under_two_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = conv(3, 8), conv(8, 6), conv(6, 2)
            self.same = self.a
            self.blocks = nn.ModuleList([self.b])

        def forward(self, x):
            return self.o(self.blocks[0](self.same(x)))

    model = randomise(Named())
    pruned = assert_exact(model, (image_of(3),))
    assert set(pruned.state_dict()) <= set(model.state_dict())
    assert widths(pruned) == {"a": 4, "a.bias": 4, "b": 3, "b.bias": 3, "o": 2, "o.bias": 2}


def test_a_weight_shared_by_embedding_and_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.l, self.h = (
                nn.Embedding(11, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 11, bias=False),
            )
            self.h.weight = self.e.weight

        def forward(self, ids):
            return self.h(F.relu(self.l(self.e(ids))))

    pruned = assert_exact(randomise(Tied()), (torch.randint(0, 11, (2, 5)),))
    assert pruned.h.weight is pruned.e.weight and pruned.e.weight.shape == (11, 4)


def test_tensors_that_are_no_buffers():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = conv(3, 8), conv(8, 2)
            self.scales = [
                torch.rand(8, 1, 1, dtype=torch.float64),
                torch.rand(1, dtype=torch.float64),
            ]

        def forward(self, x):
            return self.o(self.a(x) * self.scales[0] + self.scales[1])

    assert widths(assert_exact(randomise(Plain()), (image_of(3),)))["a"] == 4


def test_numpy_in_forward():
    import numpy as np

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = conv(3, 8), conv(8, 2)

        def forward(self, x):
            x = self.a(x) * np.float64(0.5) * np.sqrt(8)
            return self.o(x * torch.from_numpy(np.linspace(0, 1, 8)).view(1, 8, 1, 1))

    assert widths(assert_exact(randomise(Scaled()), (image_of(3),)))["a"] == 4


def test_keyword_only_and_optional_arguments():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = conv(3, 8), conv(8, 2)

        def forward(self, x=None, *, image, mask=None, scale=2):
            y = self.a(image) * scale
            return self.o(y if mask is None else y * mask)

    pruned = assert_exact(randomise(Keywords()), (), kwargs={"image": image_of(3)})
    assert widths(pruned)["a"] == 4
    both = {"image": image_of(3), "mask": image_of(1)}
    assert widths(assert_exact(randomise(Keywords()), (), kwargs=both))["a"] == 4


def test_an_example_of_a_tensor_subclass():
    """What a data set hands out; the norm after the convolution is still seen."""
    example = image_of(3).as_subclass(Picture)
    pruned = fxprune.prune(randomise(plain_net()), (example,), criterion="l1")
    assert widths(pruned)["0"] == 4 and widths(pruned)["1"] == 4


class Picture(torch.Tensor):
    pass


def test_detached_values():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = conv(3, 8), conv(8, 6), conv(6, 2)

        def forward(self, x):
            return self.o(self.b(self.a(x).detach())).detach()

    pruned = assert_exact(randomise(Detached()), (image_of(3),))
    assert widths(pruned)["a"] == 4 and widths(pruned)["b"] == 3
    assert not pruned(image_of(3)).requires_grad


def test_what_is_no_tensor_comes_back_as_it_was():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = conv(3, 8), conv(8, 2)

        def forward(self, x):
            return {
                "y": self.o(self.a(x)),
                "n": 3,
                "none": None,
                "s": "text",
                "t": (1, 2.5),
                "b": x.shape[0],
            }

    pruned = assert_exact(randomise(Mixed()), (image_of(3),))
    got = pruned(image_of(3, batch=5))
    assert {k: v for k, v in got.items() if k != "y"} == {
        "n": 3,
        "none": None,
        "s": "text",
        "t": (1, 2.5),
        "b": 5,
    }


def test_a_forward_that_changes_its_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = conv(3, 8), conv(8, 2)

        def forward(self, x):
            x.mul_(2)
            return self.o(self.a(x))

    x = image_of(3)
    before = x.clone()
    pruned = assert_exact(randomise(InPlace()), (x,))
    assert widths(pruned)["a"] == 4 and torch.equal(x, before)


def test_verification_leaves_the_buffers_alone():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = conv(3, 8), conv(8, 2)
            self.register_buffer("mean", torch.rand(8))

        def forward(self, x):
            y = self.a(x)
            self.mean.mul_(0.9).add_(y.mean((0, 2, 3)))
            return self.o(y - self.mean.view(1, -1, 1, 1))

    model = randomise(Average())
    before = model.mean.clone()
    pruned = fxprune.prune(model, (image_of(3),), criterion="l1")
    kept = kept_of(pruned, "a.weight")
    assert torch.equal(model.mean, before) and torch.equal(pruned.mean, before[kept])
    reference = masked(model, pruned.fxprune.plan.kept)
    assert gap(run(reference, (image_of(3),)), run(pruned, (image_of(3),))) < 1e-9


RANDOM = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "noise": lambda x: x + torch.randn_like(x),
    "one number": lambda x: x * torch.rand(1, dtype=x.dtype),
    "rrelu": lambda x: F.rrelu(x, training=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_network_that_draws_random_numbers(name):
    """Two runs of it differ by themselves; that is no defect."""

    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = conv(3, 8), conv(8, 6), conv(6, 2)

        def forward(self, x):
            return self.o(RANDOM[name](self.b(self.a(x))))

    pruned = fxprune.prune(randomise(Draws()), (image_of(3),), criterion="l1")
    assert widths(pruned)["a"] == 4 and pruned(image_of(3)).shape == (2, 2, 8, 8)


def test_old_style_weight_norm():
    """The weight is made by a hook, from two parameters."""
    model = plain_net().double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(model[3])
    pruned = fxprune.prune(model, (image_of(3),), criterion="l1")
    assert pruned.get_submodule("6").weight.shape[1] == 3
    before = model(image_of(3))
    assert pruned(image_of(3)).shape == before.shape


# -- torchvision's own pieces ----------------------------------------------------------------------


def test_torchvision_ops():
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(
        conv(3, 8),
        ops.FrozenBatchNorm2d(8),
        nn.ReLU(),
        ops.SqueezeExcitation(8, 4),
        ops.StochasticDepth(0.1, "row"),
        ops.Conv2dNormActivation(8, 6),
        nn.Flatten(2),
        ops.MLP(64, [5, 3]),
    )
    pruned = assert_exact(randomise(model), (image_of(3),))
    found = widths(pruned)
    assert (found["0"], found["1"], found["3.fc1"], found["3.fc2"], found["7.0"]) == (4, 4, 2, 4, 3)
    assert pruned.get_submodule("1").running_mean.shape == (4,)


def test_deformable_convolution():
    ops = pytest.importorskip("torchvision.ops")

    class Deformable(nn.Module):
        def __init__(self):
            super().__init__()
            self.s, self.a, self.offsets = conv(3, 6), conv(6, 8), conv(8, 18)
            self.d, self.o = ops.DeformConv2d(8, 6, 3, padding=1), conv(6, 2)

        def forward(self, x):
            x = self.a(self.s(x))
            return self.o(self.d(x, self.offsets(x)))

    pruned = assert_exact(randomise(Deformable()), (image_of(3),))
    assert widths(pruned)["s"] == 3 and widths(pruned)["offsets"] == 9  # masked offsets are zero


# -- time ------------------------------------------------------------------------------------------


def test_attention_over_pixels_is_quick():
    """64 channels on 32 x 32: the map of 1024 x 1024 weights carries no channels."""
    q, k, v, o = (conv(3, 64, 1), conv(3, 64, 1), conv(3, 64, 1), conv(64, 2, 1))
    case = net(image(3, 32), q=q, k=k, v=v, o=o)(CASES["non_local"].forward)
    model, args = case.build(), case.args()
    start = time.perf_counter()
    pruned = fxprune.prune(model, args, criterion="l1", verify="shapes")
    assert time.perf_counter() - start < 10
    assert widths(pruned)["q"] == 32


def test_wide_dense_networks_are_quick():
    """A list of 40 pieces, joined again at every step."""
    layers = nn.ModuleList(conv(16 + 8 * i, 8) for i in range(40))

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layers, self.last = conv(3, 16), layers, conv(16 + 8 * 40, 2)

        def forward(self, x):
            found = [self.first(x)]
            for layer in self.layers:
                found.append(F.relu(layer(torch.cat(found, 1))))
            return self.last(torch.cat(found, 1))

    model = Dense().double().eval()
    start = time.perf_counter()
    pruned = fxprune.prune(model, (image_of(3),), criterion="l1", verify="shapes")
    assert time.perf_counter() - start < 20
    assert pruned.last.in_channels == 8 + 4 * 40


class UnflattenPixels(nn.Module):
    """`nn.Unflatten` of a dim that is not the channels'."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 1)
        self.u = nn.Unflatten(2, (4, 4))
        self.o = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        return self.o(self.u(self.a(x).flatten(2)))


def test_unflatten_of_pixels_keeps_its_sizes():
    pruned = fxprune.prune(UnflattenPixels(), torch.randn(2, 3, 4, 4), rate=0.5)
    assert pruned.u.unflattened_size == (4, 4)
    assert pruned(torch.randn(2, 3, 4, 4)).shape == (2, 2, 4, 4)


class Causal(nn.Module):
    """Attention to what came before: a buffer holds what is added to the others' weights."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("mask", torch.full((6, 6), -math.inf).triu(1))
        self.register_buffer("best", torch.tensor(math.inf))
        self.register_buffer("hidden", torch.full((8,), -math.inf))

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).mT / 8**0.5 + self.mask).softmax(-1)
        return self.o((weights @ self.v(x)).maximum(self.hidden))


def test_a_mask_of_infinities_in_a_buffer_is_no_obstacle():
    model, x = Causal().double().eval(), torch.randn(2, 6, 8, dtype=torch.float64)
    pruned = fxprune.prune(model, x, rate=0.5)
    assert widths(pruned)["q"] == 4 and widths(pruned)["v"] == 4
    assert pruned.hidden.tolist() == [-math.inf] * 4
    narrow = masked(model, pruned.fxprune.plan.kept)
    narrow.hidden.fill_(-math.inf)
    assert gap(narrow(x), pruned(x)) < 1e-9
    assert pruned.fxprune.report.verification.difference < 1e-9


class Renormed(nn.Module):
    """Rows of a table are scaled down to a norm over all channels, and written back."""

    def __init__(self, look: str):
        super().__init__()
        made = nn.EmbeddingBag if look == "bag" else nn.Embedding
        self.e = made(11, 16, max_norm=None if look == "call" else 1.0)
        self.a, self.o, self.look = nn.Linear(16, 8), nn.Linear(8, 3), look

    def forward(self, i):
        if self.look == "call":
            return self.o(self.a(F.embedding(i, self.e.weight, None, 1.0)))
        return self.o(self.a(self.e(i)))


@pytest.mark.parametrize("look", ["module", "bag", "call"])
def test_rows_of_a_largest_norm_keep_their_channels(look):
    """A norm over fewer channels is another one; and the model's own rows are not changed."""
    model, x = Renormed(look), torch.randint(0, 11, (2, 7))
    rows = model.e.weight.detach().clone()
    pruned = fxprune.prune(model, x, rate=0.5)
    assert widths(pruned)["a"] == 4 and pruned.a.in_features == 16
    assert torch.equal(model.e.weight, rows) and torch.equal(pruned.e.weight, rows)
    reference = masked(model, pruned.fxprune.plan.kept)
    assert gap(reference(x), pruned(x)) < 1e-5


def test_why_an_embedding_of_a_largest_norm_is_not_known():
    analysis = fxprune.analyze(Renormed("module"), torch.randint(0, 11, (2, 7)))
    assert list(analysis.flow.unknown.values()) == ["has no rule for max_norm=1.0"]


class Attributes(dict):
    """A dict whose items are attributes too: every name that is no item is a KeyError."""

    __getattr__ = dict.__getitem__


@dataclasses.dataclass
class Output:
    y: Tensor


WRAPS = {
    "a dict with attributes": lambda y: Attributes(y=y),
    "a defaultdict": lambda y: collections.defaultdict(list, {"y": y}),
    "dataclasses in a list": lambda y: [Output(y)],
    "a dict of dicts in tuples": lambda y: ({"a": Attributes(y=y)},),
}


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.a, self.o, self.wrap = nn.Linear(5, 8), nn.Linear(8, 3), wrap

    def forward(self, x):
        return self.wrap(self.o(self.a(x)))


@pytest.mark.parametrize("name", WRAPS)
def test_outputs_in_any_container_are_compared(name):
    model = Wrapped(WRAPS[name])
    pruned = fxprune.prune(model, torch.randn(2, 5), rate=0.5)
    assert pruned.fxprune.report.verification.elements == 6
    pruned.o.weight.data.mul_(2)
    with pytest.raises(fxprune.errors.VerificationError, match="differs from"):
        fxprune.verify(model, pruned, pruned.fxprune.plan)


class Nested(nn.Module):
    """Takes images in any nest, and things that are no tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.o = conv(3, 8), conv(8, 2)

    def forward(self, images, rows=None, scale=1.0, mode=None, flip=False):
        found = images if isinstance(images, (tuple, list)) else [images]
        found = [each["x"] if isinstance(each, dict) else each for each in found]
        made = [self.o(self.a(each)) * (2 if mode == "twice" else 1) for each in found]
        made = [each.flip(1) if flip else each for each in made]
        made = [each if rows is None else each[rows] for each in made]
        if scale == math.inf:
            return made
        return [each * scale for each in made]


NESTS = {
    "a list": ([image_of(3), image_of(3)],),
    "a list of one": ([image_of(3)],),
    "a tuple of dicts": (({"x": image_of(3)}, {"x": image_of(3), 2: None}),),
    "a number": (image_of(3), None, 2.5),
    "an infinite number": (image_of(3), None, math.inf),
    "a whole number, a string and a flag": (image_of(3), None, 2, "twice", True),
    "whole numbers": (image_of(3), torch.tensor([1, 0, 1])),
    "names": {"images": [image_of(3)], "scale": 2.5, "mode": None, "flip": True},
}


@pytest.mark.parametrize("name", NESTS)
def test_a_plan_knows_the_inputs_it_was_made_with(name):
    model = Nested().double()
    pruned = fxprune.prune(model, NESTS[name], rate=0.5)
    plan = fxprune.Plan.from_json(pruned.fxprune.plan.to_json())
    assert plan == pruned.fxprune.plan
    again = fxprune.apply(model, plan)
    assert again.code == pruned.code and widths(again) == widths(pruned)
    assert again.fxprune.report.inputs == pruned.fxprune.report.inputs
    assert fxprune.verify(model, pruned, plan).difference < 1e-9


def test_a_plan_of_inputs_that_no_file_holds_needs_them_again():
    class Odd(Nested):
        def forward(self, images, dtype):
            return self.o(self.a(images)).to(dtype)

    model, inputs = Odd().double(), (image_of(3), torch.float64)
    pruned = fxprune.prune(model, inputs, rate=0.5)
    assert pruned.fxprune.plan.inputs is None
    assert widths(fxprune.apply(model, pruned.fxprune.plan, inputs)) == widths(pruned)
