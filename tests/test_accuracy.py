"""The tasks and the peer of benchmarks/accuracy.py, on networks small enough to look at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import accuracy_data as data
from benchmarks import accuracy_peer as peer


def network() -> nn.Module:
    """With scales that differ: the peer takes channels of equal score all together."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    for norm in (made[1], made[4]):
        nn.init.uniform_(norm.weight)
    return made.eval()


def some(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 12, 12, generator=generator)
    return x, torch.arange(count) % 10


def test_macs_are_those_that_fxprune_counts():
    x, _ = some(1)
    assert peer.macs(network(), x) == fxprune.count(network(), x).macs


@pytest.mark.parametrize("kept", [(), ("0",)])
def test_every_way_leaves_the_share_and_the_dense_network(kept):
    pytest.importorskip("torch_pruning")
    dense, (x, y) = network(), some()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    for name, way in peer.ways(kept).items():
        made = peer.prune(dense, way, x[:1], 0.5, [(x, y)], F.cross_entropy)
        assert abs(peer.macs(made, x[:1]) / peer.macs(dense, x[:1]) - 0.5) <= peer.FAR, name
        assert made(x).shape == (8, 10)
        assert made[0].out_channels == 16 or "whole" in name
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_layers_take_the_next_ratio_where_one_for_all_is_too_coarse():
    """Of 4 channels each, half of the MACs is between one for all and the next."""
    pytest.importorskip("torch_pruning")
    layers = [nn.Conv2d(4, 4, 1) for _ in range(12)]
    dense, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2)).eval(), torch.randn(1, 4, 1, 1)
    made = peer.prune(dense, peer.ways()["l2, local, whole"], x, 0.4, [], F.cross_entropy)
    widths = {layer.out_channels for layer in made if isinstance(layer, nn.Conv2d)}
    assert widths == {2, 3}


def test_squares_of_all_samples_are_added_up_where_it_is_mended():
    pytest.importorskip("torch_pruning")
    model, (x, y) = network(), some(3)
    squares = []
    for one in range(3):
        model.zero_grad()
        F.cross_entropy(model(x[one : one + 1]), y[one : one + 1]).backward()
        squares.append(model[0].weight.grad ** 2)
    for name, meant in (("hessian, mended", sum(squares) / 3), ("hessian", squares[-1])):
        way = peer.ways()[f"{name}, local, whole"]
        peer.squared(model, way.importance(), [(x, y)], F.cross_entropy)
        assert torch.allclose(model[0].weight.grad, meant), name


def test_tones_are_the_same_again_and_normalised():
    (x, y), (again, _) = data.tones(50, 1), data.tones(50, 1)
    assert torch.equal(x, again) and not torch.equal(x, data.tones(50, 2)[0])
    assert x.mean(1).abs().max() < 1e-5 and (x.std(1) - 1).abs().max() < 1e-4
    assert y.min() >= 0 and y.max() < data.BINS


def test_a_tone_has_the_pitch_of_its_bin():
    """Of high pitches, where the first partial is far from its neighbours."""
    x, y = data.tones(400, 1)
    x, y = x[y > 240], y[y > 240]
    spectrum = torch.fft.rfft(x, 16 * data.FRAME).abs()
    hertz = 10 * 2 ** ((data.LOWEST + data.CENTS * y) / 1200)
    place = (hertz * 16 * data.FRAME / data.RATE).round().long()
    loud = spectrum.gather(1, place[:, None])[:, 0] / spectrum.mean(1)
    assert (loud > 3).float().mean() > 0.95


def test_the_loss_of_tones_is_least_at_the_blurred_bin():
    y = torch.tensor([100, 200])
    distance = 20 * (torch.arange(360) - y[:, None])
    best = torch.exp(-(distance**2) / 1250.0)
    assert data.near(best, y + 2).all() and not data.near(best, y + 3).any()
    least = data.blurred_loss(best, y)
    assert least < data.blurred_loss(best.roll(1, 1), y)
    assert least < data.blurred_loss((best * 0.9), y)


def test_batches_shuffle_with_a_generator_only():
    x, y = some(10)
    task = data.Task("some", network, (x, y), (x, y), (x, y), augment=lambda x, _: -x)
    plain = list(task.batches(task.train, 4))
    assert torch.equal(torch.cat([x for x, _ in plain]), x) and len(plain) == 3
    mixed = list(task.batches(task.train, 4, torch.Generator().manual_seed(0)))
    labels = torch.cat([y for _, y in mixed])
    assert not torch.equal(labels, y) and torch.equal(labels.sort().values, y)
    assert torch.equal(mixed[0][0], -x[mixed[0][1]])
    assert 0 <= task.accuracy(network(), task.test) <= 1


def test_a_network_is_fitted_the_same_again_and_in_eval_mode():
    x, y = some(10)
    task = data.Task("some", network, (x, y), (x, y), (x, y))
    fitted = [network() for _ in range(2)]
    for model in fitted:
        data.fit(model, task, steps=3)
    one, other = (model[0].weight for model in fitted)
    assert torch.equal(one, other) and not torch.equal(one, network()[0].weight)
    assert not fitted[0].training
