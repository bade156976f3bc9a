"""Results told from rules have the shapes and dtypes of those that are computed."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxprune import rules, shapes

IMAGE, VOLUME, SIGNAL = (3, 4, 8, 12), (3, 4, 6, 6, 8), (3, 4, 20)
TOLD = [
    (nn.Conv2d(4, 6, 3, 2, 1), IMAGE),
    (nn.Conv2d(4, 8, (3, 1), padding="same", groups=2), IMAGE),
    (nn.Conv1d(4, 6, 3, padding_mode="circular"), SIGNAL),
    (nn.Conv3d(4, 6, 3, dilation=2), VOLUME),
    (nn.ConvTranspose2d(4, 6, 3, 2, output_padding=1), IMAGE),
    (nn.Linear(12, 5), IMAGE),
    (nn.BatchNorm2d(4), IMAGE),
    (nn.GroupNorm(2, 4), IMAGE),
    (nn.LayerNorm((8, 12)), IMAGE),
    (nn.Hardswish(), IMAGE),
    (nn.AdaptiveAvgPool2d((1, 2)), IMAGE),
    (nn.AdaptiveAvgPool2d((None, 2)), IMAGE),
    (nn.AvgPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    (nn.Upsample(scale_factor=1.5, mode="bilinear"), IMAGE),
]
COMPUTED = [(nn.PixelUnshuffle(2), IMAGE), (nn.MaxPool2d(2, return_indices=True), IMAGE)]


@pytest.mark.parametrize(("module", "shape"), TOLD, ids=lambda v: str(v)[:40])
def test_modules_are_told(module, shape):
    expected = module(torch.randn(shape))
    found = shapes.of_module(rules.current(), module, (torch.empty(shape, device="meta"),), {})
    assert found is not None and found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize(("module", "shape"), COMPUTED, ids=lambda v: str(v)[:40])
def test_modules_that_an_empty_batch_does_not_tell(module, shape):
    x = torch.empty(shape, device="meta")
    assert shapes.of_module(rules.current(), module, (x,), {}) is None


WEIGHT, HALF, MASK = torch.randn(6, 4, 3, 3), torch.ones(12).half(), torch.ones(8, 12).bool()
CALLS = [
    lambda x: x + x[:1],
    lambda x: x * 2.5,
    lambda x: x > 0,
    lambda x: torch.where(MASK, x, -x),
    lambda x: x + HALF,
    lambda x: torch.relu(x),
    lambda x: F.gelu(x),
    lambda x: torch.cat((x, x), 1),
    lambda x: torch.stack((x, x, x), -1),
    lambda x: x.mean((2, 3)),
    lambda x: x.sum(1, keepdim=True),
    lambda x: x.amax(-1),
    lambda x: x.std(2),
    lambda x: x.argmax(1),
    lambda x: F.softmax(x, 1),
    lambda x: F.conv2d(x, WEIGHT, stride=2),
    lambda x: F.linear(x, WEIGHT[0, 0].repeat(1, 4)),
    lambda x: F.adaptive_avg_pool2d(x, 1),
    lambda x: F.max_pool2d(x, 2),
    lambda x: F.interpolate(x, scale_factor=2),
]


class _Seen(torch.overrides.TorchFunctionMode):
    """Collects what is told of each call, beside what it computes."""

    def __init__(self):
        super().__init__()
        self.pairs = []

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        meta, kept = torch.utils._pytree.tree_map(
            lambda t: t.to("meta") if t is X else t, (args, kwargs or {})
        )
        told = shapes.of_call(rules.current(), func, meta, kept)
        if told is not None:
            self.pairs.append((told, found))
        return found


X = torch.randn(IMAGE)


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_calls_are_told(call):
    with _Seen() as seen:
        call(X)
    assert seen.pairs
    for told, found in seen.pairs:
        assert (told.shape, told.dtype) == (found.shape, found.dtype) and told.is_meta


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.cat((x, x)),  # the items of the batch are joined
        lambda x: x.mean(0),
        lambda x: x.mean(),
        lambda x: x.sum((0, 1)),
        lambda x: x.std((-4, 1)),
        lambda x: x.add_(1),
        lambda x: F.pixel_unshuffle(x, 2),
        lambda x: torch.add(x, 1, out=torch.empty(IMAGE)),
    ],
)
def test_calls_that_are_not(call):
    with _Seen() as seen:
        call(X)
    assert not seen.pairs


def test_a_misfit_is_not_told():
    x = torch.empty(3, 5, 8, 8, device="meta")
    assert shapes.of_module(rules.current(), nn.Conv2d(4, 6, 3), (x,), {}) is None
    with pytest.raises(rules.RuleError):
        shapes.of_module(rules.current(), nn.BatchNorm2d(4), (x,), {})


PROGRAM = """
import sys, torch, fxprune
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 3),
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
assert "torch._dynamo" not in sys.modules
fxprune.prune(net, torch.randn(1, 3, 8, 8), rate=0.5)
assert "torch._dynamo" not in sys.modules
"""


def test_torchs_compiler_is_not_imported():
    """Its import takes seconds; ops that torch decomposes on the meta device would bring it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
