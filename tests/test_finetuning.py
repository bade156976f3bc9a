"""Fine-tuning: it learns, its teacher stays, and a killed run ends as one that was not."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.distilling import distance
from fxprune.errors import InputError, ModelError, OptionError, SaveError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.b = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.bn(self.a(x)).relu()))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


class Noisy(TensorDataset):
    """As if inputs were augmented at random."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn(x.shape), y


def data(kind: type[TensorDataset] = TensorDataset) -> DataLoader:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(kind(x, x[:, :3].argmax(1)), batch_size=16, shuffle=True)


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_pruned_network_learns():
    model = net()
    pruned = fxprune.prune(model, torch.rand(2, 6), rate=0.5)
    seen = []
    history = fxprune.finetune(
        pruned, data(), epochs=30, lr=0.1, progress=lambda *each: seen.append(each)
    )
    assert history.steps == len(seen) == 120 and seen[-1][:2] == (120, 120)
    assert sum(history.losses[-4:]) < 0.6 * sum(history.losses[:4])
    assert history.seconds > 0


def test_a_teacher_teaches_and_stays():
    teacher = net()
    before = copy.deepcopy(teacher)
    pruned = fxprune.prune(teacher, torch.rand(2, 6), rate=0.5)
    history = fxprune.finetune(pruned, data(), teacher=teacher, alpha=1.0, epochs=20, lr=0.05)
    assert sum(history.losses[-4:]) < sum(history.losses[:4])
    assert equal(teacher, before) and teacher.training
    assert all(param.requires_grad and param.grad is None for param in teacher.parameters())


def test_the_first_loss_is_hintons():
    model, teacher = net().eval(), net().eval()
    teacher.b.bias.data += torch.tensor([1.0, 0.0, -1.0])
    x, y = next(iter(data()))
    model.drop.p = 0.0
    ours, theirs = copy.deepcopy(model).train()(x), teacher(x)
    soft = F.softmax(theirs / 4, 1)
    divergence = (soft * (soft.log() - F.log_softmax(ours / 4, 1))).sum(1).mean()
    expected = 0.3 * 16 * divergence + 0.7 * F.cross_entropy(ours, y)
    found = fxprune.finetune(model, [(x, y)], teacher=teacher, alpha=0.3).losses
    assert found == pytest.approx([float(expected.detach())])
    assert not model.training


def test_other_outputs_are_compared_by_squares():
    a, b = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    y = torch.zeros(2, 4, dtype=torch.long)
    assert torch.equal(distance(a, b, y, 4.0), F.mse_loss(a, b))
    both = distance({"x": a, "y": (b,)}, {"x": b, "y": (a,)}, y, 4.0)
    assert torch.allclose(both, 2 * F.mse_loss(a, b))


def test_modes_frozen_parameters_and_random_numbers_are_left_alone():
    model = net()
    model.bn.eval()
    model.a.requires_grad_(False)
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    fxprune.finetune(model, data(), epochs=2)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert model.training and not model.bn.training
    assert torch.equal(model.bn.running_mean, before.bn.running_mean)
    assert torch.equal(model.a.weight, before.a.weight) and model.a.weight.grad is None
    assert not torch.equal(model.b.weight, before.b.weight)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", None])
def test_the_learning_rate_follows_its_schedule_and_is_put_back(schedule):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates = []
    fxprune.finetune(
        model,
        data(),
        steps=10,
        optimizer=optimizer,
        schedule=schedule,
        progress=lambda *_: rates.append(optimizer.param_groups[0]["lr"]),
    )
    tops = {"one_cycle": 3, "cosine": 0, None: 0}
    assert rates.index(max(rates)) == tops[schedule] and max(rates) == pytest.approx(0.1)
    assert optimizer.param_groups[0]["lr"] == 0.1


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_finetuning import Noisy, data, net
import fxprune
def progress(step, total, loss):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
fxprune.finetune(net(), data(Noisy), epochs=4, checkpoint={file!r}, every=3, progress=progress)
"""


@pytest.mark.parametrize("step", [5, 13])  # the checkpoint before: amid an epoch, and at an end
def test_a_killed_run_ends_bit_equal(tmp_path, step):
    file, tests = tmp_path / "run.pt", Path(__file__).parent
    code = KILLED.format(tests=str(tests), file=str(file), step=step)
    paths = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    killed = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    resumed, whole = net(), net()
    steps = []
    history = fxprune.finetune(
        resumed,
        data(Noisy),
        epochs=4,
        checkpoint=file,
        every=3,
        progress=lambda done, *_: steps.append(done),
    )
    expected = fxprune.finetune(whole, data(Noisy), epochs=4)
    assert steps[0] == step // 3 * 3 + 1
    assert history.losses == expected.losses
    assert equal(resumed, whole)
    assert [each.name for each in tmp_path.iterdir()] == ["run.pt"]


def test_a_growing_penalty_goes_on_with_the_run(tmp_path):
    class Stop(Exception):
        pass

    def stop(step, total, loss):
        if step == 6:
            raise Stop

    def run(model, **options):
        plan = fxprune.plan(fxprune.analyze(net(), torch.rand(2, 6)), rate=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        penalty = fxprune.GrowingPenalty(model, plan, delta=0.05, every=2)
        with penalty.attach(optimizer):
            fxprune.finetune(model, data(), steps=10, optimizer=optimizer, **options)
        return penalty

    whole, resumed, file = net(), net(), tmp_path / "run.pt"
    run(whole)
    with pytest.raises(Stop):
        run(net(), checkpoint=file, every=5, progress=stop)
    assert run(resumed, checkpoint=file, every=5).count == 10
    assert equal(resumed, whole)
    with pytest.raises(SaveError, match="does not fit"):
        optimizer = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
        fxprune.finetune(resumed, data(), steps=10, optimizer=optimizer, checkpoint=file)


def test_a_finished_run_is_loaded(tmp_path):
    first, second = net(), net()
    fxprune.finetune(first, data(), checkpoint=tmp_path / "run.pt")
    fxprune.finetune(second, data(), checkpoint=tmp_path / "run.pt")
    assert equal(first, second)


def test_checkpoints_that_do_not_fit(tmp_path):
    file = tmp_path / "run.pt"
    fxprune.finetune(net(), data(), checkpoint=file)
    with pytest.raises(SaveError, match="seed was 0, and is 1"):
        fxprune.finetune(net(), data(), checkpoint=file, seed=1)
    pruned = fxprune.prune(net(), torch.rand(2, 6), rate=0.5)
    with pytest.raises(SaveError, match="does not fit"):
        fxprune.finetune(pruned, data(), checkpoint=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SaveError, match="cannot be read"):
        fxprune.finetune(net(), data(), checkpoint=file)
    torch.save({"a": 1}, file)
    with pytest.raises(SaveError, match="no checkpoint"):
        fxprune.finetune(net(), data(), checkpoint=file)


def test_errors():
    x, y = torch.rand(4, 6), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ModelError, match="nan at step 1") as caught:
        fxprune.finetune(net(), [(x * torch.nan, y)])
    assert "lower lr" in caught.value.hint
    with pytest.raises(InputError, match="holds no batch"):
        fxprune.finetune(net(), [])
    with pytest.raises(OptionError, match="no length"):
        fxprune.finetune(net(), iter([(x, y)]))
    with pytest.raises(InputError, match="0 batches in epoch 2"):
        fxprune.finetune(net(), iter([(x, y)]), steps=2)
    with pytest.raises(InputError, match="no pair"):
        fxprune.finetune(net(), [x])
    with pytest.raises(ModelError, match="frozen"):
        fxprune.finetune(net().requires_grad_(False), [(x, y)])
    with pytest.raises(OptionError, match="no usual loss"):
        fxprune.finetune(net(), [(x, x)])
    with pytest.raises(OptionError, match="holds no parameter"):
        fxprune.finetune(net(), [(x, y)], optimizer=torch.optim.SGD(net().parameters()))
    with pytest.raises(OptionError, match="share"):
        model = net()
        fxprune.finetune(model, [(x, y)], teacher=model)
    with pytest.raises(OptionError, match="teacher gives"):
        fxprune.finetune(net(), [(x, y)], teacher=nn.Linear(6, 5))
    with pytest.raises(OptionError, match="schedule"):
        fxprune.finetune(net(), [(x, y)], schedule="linear")
