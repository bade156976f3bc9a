"""The reference networks: their sizes before and after the published prunings, to the last
parameter, and what their layers compute."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune import models
from fxprune.errors import OptionError
from fxprune.models.big_little import InvertedResidual
from fxprune.models.mobilenet_v3 import SQUEEZE, Bottleneck
from fxprune.models.resnet_cifar import Block, PadShortcut

torch.set_num_threads(1)


def images(size: int, count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, size, size, generator=generator)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def torchvision_form(num_classes: int = 10) -> nn.Module:
    return models.mobilenet_v3_large(num_classes, expand_first=False)


def blnet_224(num_classes: int = 10) -> nn.Module:
    return models.mobile_blnet(num_classes, image_size=224)


def lively(model: nn.Module) -> nn.Module:
    """The model in eval mode, with norms that do not all do the same, and weights with which every
    layer matters: as they start, depthwise ones are so small that constants drown the image."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in")
    return model.eval()


# -- sizes -----------------------------------------------------------------------------------------

DENSE = [
    (models.mobilenet_v3_large, 10, 224, 4_215_130, 218_533_824),
    (models.mobilenet_v3_large, 100, 224, 4_330_420, 218_649_024),
    (torchvision_form, 10, 224, 4_214_842, 215_322_560),
    (models.resnet20, 10, 32, 269_722, 40_551_040),
    (models.resnet20, 100, 32, 275_572, 40_556_800),
    (models.resnet32, 10, 32, 464_154, 68_862_592),
    (models.resnet32, 100, 32, 470_004, 68_868_352),
    (models.resnet44, 10, 32, 658_586, 97_174_144),
    (models.resnet56, 10, 32, 853_018, 125_485_696),
    (models.resnet56, 100, 32, 858_868, 125_491_456),
    (models.resnet110, 10, 32, 1_727_962, 252_887_680),
    (models.resnet110, 100, 32, 1_733_812, 252_893_440),
    (models.mobile_blnet, 10, 32, 334_770, 19_560_960),
    (models.mobile_blnet, 100, 32, 450_060, 19_676_160),
    (blnet_224, 101, 224, 1_723_805, 359_767_328),
    (blnet_224, 1000, 224, 2_875_424, 360_918_048),
]
FAMILIES = [models.mobilenet_v3_large, torchvision_form, models.resnet20, models.mobile_blnet]
Build = Callable[..., nn.Module]


@pytest.mark.parametrize("build, classes, size, params, macs", DENSE)
def test_sizes(build: Build, classes: int, size: int, params: int, macs: int):
    model = build(classes)
    assert parameters(model) == params
    assert fxprune.analyze(model, images(size)).macs() == macs


# -- all networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [*FAMILIES, blnet_224])
def test_one_row_an_image_one_column_a_class(build: Build):
    assert build(7).eval()(images(64, count=3)).shape == (3, 7)


@pytest.mark.parametrize("build", [models.mobilenet_v3_large, models.resnet20])
def test_odd_image_sizes_will_do(build: Build):
    assert build().eval()(images(37)).shape == (1, 10)


@pytest.mark.parametrize("build", FAMILIES)
def test_every_parameter_learns(build: Build):
    torch.manual_seed(0)
    model = build()
    F.cross_entropy(model(images(32, count=4)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("build", FAMILIES)
def test_torch_fx_traces_them(build: Build):
    model = lively(build())
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(images(32)), model(images(32)))


@pytest.mark.parametrize("build", FAMILIES)
def test_channels_are_frozen_only_at_the_output(build: Build):
    model = build(7)
    analysis = fxprune.analyze(model, images(32))
    assert [frozen.channels for frozen in analysis.frozen] == [7]
    assert not analysis.warnings


@pytest.mark.parametrize(
    "build", [models.mobilenet_v3_large, models.resnet20, models.mobile_blnet, blnet_224]
)
@pytest.mark.parametrize("classes", [0, -1, 2.5, True])
def test_class_counts_that_are_none_are_refused(build: Build, classes: object):
    with pytest.raises(OptionError, match="num_classes"):
        build(classes)


# -- MobileNetV3-Large -----------------------------------------------------------------------------


def torchvision_pair() -> tuple[nn.Module, nn.Module]:
    """Theirs with lively normalisation layers, and ours with its weights; no dropout."""
    theirs = pytest.importorskip("torchvision").models.mobilenet_v3_large(dropout=0.0)
    ours = models.mobilenet_v3_large(1000, expand_first=False, dropout=0.0)
    ours.load_state_dict(lively(theirs).state_dict())
    return theirs, ours


def test_without_the_first_expansion_it_is_torchvisions_network():
    theirs, ours = torchvision_pair()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (theirs, ours)]
    assert list(shapes[0].items()) == list(shapes[1].items())
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images(64)), theirs.eval()(images(64)))


def test_in_training_it_moves_as_torchvisions_network():
    theirs, ours = torchvision_pair()
    for model in (theirs, ours):
        model.train()(images(64, count=4)).sum().backward()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad)


def test_the_first_expansion_is_one_more_layer():
    keys = [set(build().state_dict()) for build in (models.mobilenet_v3_large, torchvision_form)]
    assert {key.rpartition(".")[0] for key in keys[0] - keys[1]} == {
        "features.1.block.2.0",  # the projection, one further on
        "features.1.block.2.1",
    }
    first = models.mobilenet_v3_large().features[1].block
    assert [layer[0].weight.shape[:2] for layer in first] == [(16, 16), (16, 1), (16, 16)]
    assert isinstance(first[0][2], nn.ReLU)


def test_the_first_blocks_hidden_channels_are_free_of_its_input():
    whole = fxprune.analyze(models.mobilenet_v3_large(), images(32))
    plan = fxprune.plan(whole, rate=0.0, rates={"features.1.block.0.0": 7 / 16})
    kept = {group.name: group.kept for group in plan.groups}
    assert kept["features.1.block.0.0"] == 9 and kept["features.0.0"] == 16
    bound = fxprune.analyze(torchvision_form(), images(32)).explain("features.0.0")
    assert "features.1.block.0.0" in str(bound)


@pytest.mark.parametrize("share", [1.0, -0.1, "half"])
def test_dropouts_that_are_no_share_are_refused(share: object):
    with pytest.raises(OptionError, match="dropout"):
        models.mobilenet_v3_large(dropout=share)


def test_dropout_is_used():
    assert models.mobilenet_v3_large(dropout=0.3).classifier[2].p == 0.3


@pytest.mark.parametrize(
    "hidden, width",
    [(8, 8), (16, 8), (64, 16), (72, 24), (120, 32), (480, 120), (672, 168), (960, 240)],
)
def test_squeeze_widths(hidden: int, width: int):
    assert SQUEEZE.width(hidden) == width


# Hidden widths of the 15 blocks at a pruning rate of 50 % (Liu & Lei 2023, table 5).
HIDDEN = (16, 64, 72, 72, 120, 120, 240, 200, 184, 184, 480, 672, 672, 960, 960)
HALF = (9, 49, 42, 72, 102, 89, 223, 144, 139, 112, 209, 38, 540, 484, 255)


def liu_lei_rates() -> dict[str, float]:
    return {
        f"features.{i}.block.0.0": 1 - kept / hidden
        for i, (kept, hidden) in enumerate(zip(HALF, HIDDEN, strict=True), start=1)
    }


def test_the_published_table_is_the_networks():
    blocks = [m for m in models.mobilenet_v3_large().modules() if isinstance(m, Bottleneck)]
    assert tuple(block.block[1][0].out_channels for block in blocks) == HIDDEN


def test_the_published_widths_with_the_squeeze_layers_as_they_were():
    pruned = fxprune.prune(
        models.mobilenet_v3_large(), images(224), rate=0.0, rates=liu_lei_rates(), verify="shapes"
    )
    assert pruned.fxprune.report.params[1] == parameters(pruned) == 2_622_246
    assert pruned.fxprune.report.macs == (218_533_824, 129_833_147)


def test_the_published_widths_are_proved_on_small_images():
    model = lively(models.mobilenet_v3_large())
    pruned = fxprune.prune(model, images(32), rate=0.0, rates=liu_lei_rates())
    assert pruned.fxprune.report.verification.difference is not None
    hidden = [pruned.get_submodule(name).out_channels for name in liu_lei_rates()]
    assert tuple(hidden) == HALF


# -- CIFAR ResNets ---------------------------------------------------------------------------------


def test_the_pad_shortcut_takes_every_second_pixel_between_zeros():
    x = torch.arange(1.0, 1 + 2 * 3 * 3).view(1, 2, 3, 3)
    zeros = [[0.0, 0.0], [0.0, 0.0]]
    first, second = [[1.0, 3.0], [7.0, 9.0]], [[10.0, 12.0], [16.0, 18.0]]
    assert PadShortcut(2)(x).tolist() == [[zeros, first, second, zeros]]
    assert PadShortcut(3)(x).tolist() == [[zeros, first, second, zeros, zeros]]


@pytest.mark.parametrize("outs, front", [(16, 0), (32, 8)])
def test_a_block_adds_its_shortcut_before_the_last_relu(outs: int, front: int):
    block, step = Block(16, outs).eval(), 1 if outs == 16 else 2
    nn.init.zeros_(block.bn2.weight)
    nn.init.constant_(block.bn2.bias, 0.25)
    x = torch.randn(2, 16, 6, 6)
    expected = torch.full((2, outs, 6 // step, 6 // step), 0.25)
    expected[:, front : front + 16] += x[:, :, ::step, ::step]
    torch.testing.assert_close(block(x), expected.relu())


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_convolutions_and_the_linear_layer(depth: int):
    model = getattr(models, f"resnet{depth}")()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == (
        [(depth - 2) // 6] * 3
    )


def test_names_are_the_usual_ones():
    keys = set(models.resnet20().state_dict())
    assert {"conv1.weight", "bn1.running_mean", "linear.bias"} <= keys
    assert {f"layer{i}.2.{n}.weight" for i in (1, 2, 3) for n in ("conv1", "bn2")} <= keys
    assert not [key for key in keys if "shortcut" in key]


def test_a_network_without_blocks_is_refused():
    with pytest.raises(OptionError, match="blocks=0"):
        models.ResNetCifar(0)


def shares(widths: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Rates from (kept, width)."""
    return {pattern: 1 - kept / width for pattern, (kept, width) in widths.items()}


INNER = shares({"layer1.*conv1": (6, 16), "layer2.*conv1": (12, 32), "layer3.*conv1": (24, 64)})
COUPLED = shares(
    {
        "layer3.*conv2": (18, 32),  # the channels that stage 3 adds
        "layer2.*conv2": (10, 16),  # the channels that stage 2 adds
        "layer1.*": (10, 16),
        "layer2.*conv1": (20, 32),
        "layer3.*conv1": (38, 64),
    }
)


@pytest.mark.parametrize(
    "rates, params, macs", [(INNER, 651_202, 95_109_760), (COUPLED, 627_476, 95_720_060)]
)
def test_resnet110_at_62_percent_fewer_macs(rates: dict[str, float], params: int, macs: int):
    model = models.resnet110()
    pruned = fxprune.prune(model, images(32), rate=0.0, rates=rates, verify="shapes")
    assert pruned.fxprune.report.params[1] == parameters(pruned) == params
    assert pruned.fxprune.report.macs == (252_887_680, macs)
    assert 0.621 < 1 - macs / 252_887_680 < 0.625


@pytest.mark.parametrize("rates", [INNER, COUPLED])
def test_both_ways_are_proved_on_small_images(rates: dict[str, float]):
    pruned = fxprune.prune(lively(models.resnet20()), images(8), rate=0.0, rates=rates)
    assert pruned.fxprune.report.verification.difference is not None
    widths = (6, 12, 24) if rates is INNER else (10, 20, 38)
    for stage, width in zip((1, 2, 3), widths, strict=True):
        assert pruned.get_submodule(f"layer{stage}.1.conv1").out_channels == width


def test_channels_are_coupled_over_the_padding():
    plan = fxprune.plan(
        fxprune.analyze(models.resnet20(), images(32)), criterion="l1", rate=0.0, rates=COUPLED
    )
    stages = [plan.kept[f"layer{i}.0.conv2.weight"][0] for i in (1, 2, 3)]
    assert [len(kept) for kept in stages] == [10, 20, 38]
    assert [c + 8 for c in stages[0]] == [c for c in stages[1] if 8 <= c < 24]
    assert [c + 16 for c in stages[1]] == [c for c in stages[2] if 16 <= c < 48]


# -- Big-Little modules ----------------------------------------------------------------------------


def test_branches_meet_at_the_full_resolution():
    module, x = models.BigLittle(6, 8, 3, 2).eval(), torch.randn(2, 6, 8, 12)
    assert module.big(x).shape == (2, 8, 4, 6)
    assert module.little(x).shape == (2, 4, 8, 12)
    assert module.widen(module.little(x)).shape == (2, 8, 8, 12)
    assert module(x).shape == (2, 8, 4, 6)


def test_the_module_fuses_the_doubled_big_branch_and_the_little_one():
    module, x = lively(models.BigLittle(6, 8, 3, 1)), torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        big = module.big(x).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        expected = module.fusion(big + module.widen(module.little(x)))
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    "n, beta, big, little",
    [(2, 4, 1, 1), (3, 4, 2, 1), (8, 4, 7, 1), (12, 4, 11, 2), (4, 2, 3, 1), (6, 2, 5, 2)],
)
def test_how_many_blocks_the_branches_have(n: int, beta: int, big: int, little: int):
    module = models.BigLittle(4, 8, n, beta=beta)
    assert (len(module.big), len(module.little)) == (big, little)
    assert all(block.adds for block in (*module.big[1:], *module.little[1:]))


@pytest.mark.parametrize("alpha, width", [(1, 8), (2, 4), (3, 2), (8, 1)])
def test_how_wide_the_little_branch_is(alpha: int, width: int):
    module = models.BigLittle(4, 8, 3, alpha=alpha)
    assert module.little[-1].project.conv.out_channels == width
    assert module.big[-1].project.conv.out_channels == 8


def test_only_the_first_big_block_and_the_fusion_have_strides():
    module = models.BigLittle(4, 8, 4, 2, expand=3)
    blocks = [*module.big, *module.little, module.fusion]
    assert [block.depthwise.conv.stride[0] for block in blocks] == [2, 1, 1, 1, 2]
    assert [block.depthwise.conv.out_channels for block in blocks] == [12, 24, 24, 12, 24]


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(n=1), "big branch empty"),
        (dict(n=0), "n=0"),
        (dict(alpha=9), "no channel of 8"),
        (dict(alpha=0), "alpha=0"),
        (dict(beta=0.5), "beta=0.5"),
    ],
)
def test_modules_without_a_branch_are_refused(change: dict, match: str):
    with pytest.raises(OptionError, match=match):
        models.BigLittle(**{"ins": 4, "outs": 8, "n": 3, **change})


def test_an_inverted_residual_adds_its_input_only_to_its_like():
    x = torch.randn(1, 8, 4, 4)
    for outs, stride, adds in ((8, 1, True), (8, 2, False), (6, 1, False)):
        block = lively(InvertedResidual(8, outs, 6, stride))
        nn.init.zeros_(block.project.conv.weight)
        nn.init.zeros_(block.project.bn.running_mean)
        nn.init.zeros_(block.project.bn.bias)
        expected = x if adds else torch.zeros(1, outs, 4 // stride, 4 // stride)
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("expand", [1, 6])
def test_an_inverted_residual_cuts_at_six_and_ends_linear(expand: int):
    block = InvertedResidual(4, 4, expand, 2)
    assert [name for name, _ in block.named_children()] == ["expand", "depthwise", "project"]
    acts = [m for m in block.modules() if isinstance(m, nn.ReLU6)]
    assert len(acts) == (1 if expand == 1 else 2) and not hasattr(block.project, "act")


# -- Mobile_BLNet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 0, "32", [32], None])
def test_image_sizes_without_a_table_are_refused(size: object):
    with pytest.raises(OptionError, match="image_size") as caught:
        models.mobile_blnet(image_size=size)
    assert "32, 224" in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("size, edges", [(32, [32, 16, 8, 8, 4]), (224, [56, 28, 14, 14, 7])])
def test_the_resolution_of_each_part(size: int, edges: list[int]):
    graph = fxprune.analyze(models.mobile_blnet(image_size=size), images(size)).graph.graph
    seen = {str(node.target): node.meta["val"].shape[-1] for node in graph.nodes}
    parts = [f"bl{i}.little.0.depthwise.conv" for i in (1, 2, 3)]
    parts += ["tail.0.expand.conv", "head.conv"]
    assert [seen[part] for part in parts] == edges


# Data set: classes and image size; shares kept of hidden channels, of the little branch, of the
# head; hidden widths in order; parameters and MACs left.
BLNETS = {
    "CIFAR-10": (
        (10, 32),
        (0.50, 0.49, 0.15),
        [36, 48, 35, 48, 48, 96, 47, 96, 96, 144, 94, 144, 144, 192],
        (120_642, 9_600_512),
    ),
    "CIFAR-100": (
        (100, 32),
        (0.61, 0.62, 0.70),
        [44, 59, 45, 59, 59, 117, 60, 117, 117, 176, 119, 176, 176, 896],
        (299_220, 12_704_720),
    ),
    "Food-101": (
        (101, 224),
        (0.517, 0.537, 0.80),
        [50, 74, 124, 77, 124, 124, 248, 248, 129, 248, 248, 347, 258, 347, 347, 496, 1024],
        (995_270, 202_991_746),
    ),
    "ImageNet": (
        (1000, 224),
        (0.667, 0.637, 0.80),
        [64, 96, 160, 92, 160, 160, 320, 320, 153, 320, 320, 448, 306, 448, 448, 640, 1024],
        (2_117_643, 249_609_624),
    ),
}


def hidden_layers(model: nn.Module) -> list[str]:
    """What makes the prunable channels: expansions, in order, and the head."""
    return [n for n, _ in model.named_modules() if n.endswith(".expand.conv") or n == "head.conv"]


def blnet_rates(model: nn.Module, main: float, little: float, head: float) -> dict[str, float]:
    """One rate a layer, from the share kept of its kind, rounded to whole channels."""
    rates = {}
    for name in hidden_layers(model):
        share = head if name == "head.conv" else little if ".little." in name else main
        width = model.get_submodule(name).out_channels
        rates[name] = 1 - math.floor(share * width + 0.5) / width
    return rates


@pytest.mark.parametrize("image_size, channels", [(32, 3440), (224, 8000)])
def test_how_many_channels_may_go(image_size: int, channels: int):
    model = models.mobile_blnet(image_size=image_size)
    assert sum(model.get_submodule(n).out_channels for n in hidden_layers(model)) == channels


@pytest.mark.parametrize("data", BLNETS)
def test_the_published_sizes(data: str):
    (classes, size), kept, widths, sizes = BLNETS[data]
    model = models.mobile_blnet(classes, image_size=size)
    rates = blnet_rates(model, *kept)
    pruned = fxprune.prune(
        model, images(size), criterion="l1", rate=0.0, rates=rates, verify="shapes"
    )
    assert [pruned.get_submodule(n).out_channels for n in hidden_layers(model)] == widths
    assert (parameters(pruned), pruned.fxprune.report.macs[1]) == sizes
    assert pruned.fxprune.report.params[1] == sizes[0]


@pytest.mark.parametrize("data, size", [("CIFAR-10", 16), ("ImageNet", 32)])
def test_the_published_widths_are_proved_on_small_ones(data: str, size: int):
    (classes, layout), kept, _, (params, _) = BLNETS[data]
    model = lively(models.mobile_blnet(classes, image_size=layout))
    pruned = fxprune.prune(model, images(size), rate=0.0, rates=blnet_rates(model, *kept))
    assert pruned.fxprune.report.verification.difference is not None
    assert parameters(pruned) == params
