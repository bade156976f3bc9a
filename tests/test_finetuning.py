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


# -- what is handed in -----------------------------------------------------------------------------


A = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
B = torch.arange(8) % 3


def refused(kind, says: str, batches, **options):
    """The error, of a network that was not trained."""
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(kind, match=says) as caught:
        fxprune.finetune(model, batches, **options)
    params = zip(model.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in params) and caught.value.hint
    return caught.value


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_class_numbers_of_any_kind(dtype):
    one, other = net(), net()
    expected = fxprune.finetune(one, [(A, B)], steps=2, teacher=net())
    found = fxprune.finetune(other, [(A, B.to(dtype))], steps=2, teacher=net())
    assert found.losses == expected.losses and equal(one, other)


def test_an_item_may_be_left_out():
    losses = [
        fxprune.finetune(net(), [(A, torch.cat([B[:7], torch.tensor([left])]))]).losses
        for left in (-100, 0)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((A, B + 1), "class number 3"),
        ((A, B - 1), "class number -1"),
        ((A[:, :5], B), "does not run on the batch of step 1"),
        ((A.long(), B), "does not run on the batch of step 1"),
        ((A.double(), B), "does not run on the batch of step 1"),
        (({"z": A}, B), "does not run on the batch of step 1"),
        (((A, A), B), "does not run on the batch of step 1"),
        ((A.numpy(), B), "ndarray"),
        ((A, B.numpy()), "ndarray"),
        ((A, B[:4]), "no usual loss"),
        ((A, torch.eye(3)[B].long()), "no usual loss"),
        ((A[:0], B[:0]), "holds no items"),
        ((A, None), "no usual loss"),
    ],
)
def test_batches_that_do_not_fit_are_named(batch, says):
    refused((InputError, OptionError), says, [batch])


def test_a_teacher_that_takes_other_inputs_is_named():
    refused(InputError, "the teacher does not run", [(A, B)], teacher=nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": "adam"}, "optimizer is a str"),
        ({"optimizer": lambda params: None}, "optimizer gives None"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"loss": "ce"}, "loss is a str"),
        (
            {"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")},
            r"loss gives float32 \[8\]",
        ),
        ({"loss": lambda o, t: 1.0}, "loss gives float"),
        ({"loss": lambda o, t: None}, "loss gives None"),
        ({"loss": lambda o, t: F.cross_entropy(o.detach(), t)}, "depends on no parameter"),
        (
            {"loss": lambda o, t: nn.CrossEntropyLoss()(o, t + 9)},
            "loss fails on outputs of float32",
        ),
        ({"loss": lambda o: o.mean()}, "loss fails on outputs of float32"),
        ({"optimizer": lambda: None}, "optimizer fails"),
        ({"seed": "a"}, "seed='a'"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"progress": 3}, "no way to show progress"),
        ({"checkpoint": 3}, "checkpoint is a int"),
    ],
)
def test_options_that_cannot_be_used(options, says):
    refused(OptionError, says, [(A, B)], **options)


def test_a_wrong_share_of_the_teacher_says_what_it_is():
    assert "teacher" in refused(OptionError, "alpha=-1", [(A, B)], alpha=-1).hint


def test_a_loss_of_one_number_in_a_row_is_taken():
    loss = lambda o, t: F.cross_entropy(o, t).reshape(1)  # noqa: E731
    one, other = net(), net()
    fxprune.finetune(one, [(A, B)], loss=loss)
    fxprune.finetune(other, [(A, B)])
    assert equal(one, other)


def test_progress_is_shown_as_in_prune():
    whole = net()
    fxprune.finetune(whole, [(A, B)], steps=3)
    for progress in (True, False):
        model = net()
        assert fxprune.finetune(model, [(A, B)], steps=3, progress=progress).steps == 3
        assert equal(model, whole)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_for_the_time(without):
    whole, model = net(), net()
    fxprune.finetune(whole, [(A, B)], steps=3, teacher=net())
    with without():
        batch = (A.clone(), B.clone())  # inference tensors, which backward refuses
        fxprune.finetune(model, [batch], steps=3, teacher=net())
        assert not torch.is_grad_enabled()
    assert equal(model, whole)


def test_parameters_made_without_gradients_are_refused():
    with torch.inference_mode():
        model = net()
        with pytest.raises(ModelError, match="inference_mode") as caught:
            fxprune.finetune(model, [(A, B)])
    assert caught.value.hint


@pytest.mark.parametrize("name", ["nodir/run.pt", "file/run.pt", "."])
def test_a_checkpoint_that_cannot_be_written_is_noticed_at_the_start(name, tmp_path):
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(SaveError, match="cannot be") as caught:
        fxprune.finetune(
            net(), [(A, B)], checkpoint=tmp_path / name, progress=lambda *each: steps.append(each)
        )
    assert not steps and caught.value.hint
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def other_head() -> nn.Module:
    torch.manual_seed(1)
    model = Net()
    model.b = nn.Linear(16, 4)
    return model


class Longer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(3, 3)


@pytest.mark.parametrize("other", [other_head, Longer])
def test_a_refused_checkpoint_changes_nothing(other, tmp_path):
    file = tmp_path / "run.pt"
    fxprune.finetune(net(), data(), checkpoint=file)
    model = other()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SaveError, match="does not fit"):
        fxprune.finetune(model, data(), checkpoint=file, optimizer=optimizer)
    assert equal(model, before) and optimizer.state_dict() == state


def test_a_checkpoint_of_another_optimizer_changes_nothing(tmp_path):
    file = tmp_path / "run.pt"
    fxprune.finetune(net(), data(), checkpoint=file)
    model = other_head()
    model.b = nn.Linear(16, 3)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD([model.a.weight], lr=0.01)
    with pytest.raises(SaveError, match="does not fit"):
        fxprune.finetune(model, data(), checkpoint=file, optimizer=optimizer)
    assert equal(model, before)


def test_other_things_than_a_model_or_data_are_named():
    with pytest.raises(ModelError, match="not str") as caught:
        fxprune.finetune("net", [(A, B)])
    assert caught.value.hint
    refused(InputError, "data is a int", 3, steps=2)
    refused(InputError, "data is a NoneType", None)
    assert "data=[(X, Y)]" in refused(InputError, "no pair", (A, B)).hint
