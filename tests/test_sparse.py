"""Sparse training: the penalty's gradient, its prox, and all that can dilute or double it."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxprune
from fxprune.errors import FxpruneError, ModelError, OptionError
from fxprune.sparse import SparsityPenalty, cosine, warmup

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
S, LR = 0.01, 0.5
PRUNABLE = ["stem_bn.weight", "inner_bn.weight", "back_bn.weight"]


class Small(nn.Module):
    """A stem, one residual block, and a normalisation on the network's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_bn = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.back, self.back_bn = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head, self.head_bn = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        y = self.back_bn(self.back(self.inner_bn(self.inner(x)).relu()))
        return self.head_bn(self.head((x + y).relu())).mean((2, 3))


class Joined(nn.Module):
    """One normalisation over channels that may go (0 to 3) and channels that stay (4 and 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)
        self.bn, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b = self.b(x)
        return self.last(self.bn(torch.cat([self.a(x), b], 1))), b


class Tied(nn.Module):
    """Two normalisations with one gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.bn2.weight = self.bn1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.bn2(self.b(self.bn1(self.a(x)).relu())).relu())


def images(n: int = 8) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def small(kind: type[nn.Module] = Small) -> nn.Module:
    """In eval mode, so that a batch computes what its parts do; gammas of both signs, one zero."""
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.zeros_(module.weight[1:2])
    return model


def penalty_of(model: nn.Module, s: float = S, **options) -> SparsityPenalty:
    x = images(2).to(next(model.parameters()))
    return SparsityPenalty(model, s, example_inputs=x, **options)


def task(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gammas(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "bn" in n and "weig" in n}


def sgd(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, **options)


def after(train: Callable[[nn.Module], None], **to) -> dict[str, Tensor]:
    """The gammas of a fresh network after `train`."""
    model = small().to(**to)
    train(model)
    return gammas(model)


def close(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def penalised(plain: dict[str, Tensor], s: float = S, names=PRUNABLE) -> dict[str, Tensor]:
    """What gammas after one step of SGD must be, given those after the same step without L1."""
    start = gammas(small().to(plain[PRUNABLE[0]]))
    return {n: g - LR * s * start[n].sign() * (n in names) for n, g in plain.items()}


def plain_step(model: nn.Module) -> None:
    optimizer = sgd(model)
    task(model, images().to(next(model.parameters()))).backward()
    optimizer.step()


# -- which scales ----------------------------------------------------------------------------------


def test_only_scales_of_channels_that_may_go_are_penalised():
    penalty = penalty_of(small())
    assert penalty.names == PRUNABLE and len(penalty) == 6 + 5 + 6


def test_all_bn_takes_the_output_s_normalisation_too():
    penalty = penalty_of(small(), all_bn=True)
    assert penalty.names == [*PRUNABLE, "head_bn.weight"] and len(penalty) == 6 + 5 + 6 + 4


@pytest.mark.parametrize("all_bn", [False, True])
@pytest.mark.parametrize("way", ["add_grad", "loss", "prox"])
def test_of_a_scale_that_serves_both_kinds_a_part_is_penalised(all_bn, way):
    model = small(Joined)
    penalty, gamma = penalty_of(model, all_bn=all_bn), model.bn.weight
    before = gamma.detach().clone()
    hit = torch.tensor([1, 1, 1, 1, all_bn, all_bn])
    assert penalty.names == ["bn.weight"] and len(penalty) == int(hit.sum())
    assert penalty.value == pytest.approx(float((before.abs() * hit).sum()))
    gamma.grad = torch.zeros(6)
    if way == "add_grad":
        penalty.add_grad()
    elif way == "loss":
        penalty.loss().backward()
    else:
        penalty.prox(1.0)
        gamma.grad = before - gamma.detach()
    torch.testing.assert_close(gamma.grad, S * before.sign() * hit)


def test_only_and_ignore_choose_groups():
    model = small()
    assert penalty_of(model, only=["inner"]).names == ["inner_bn.weight"]
    assert penalty_of(model, ignore=["inner"]).names == ["stem_bn.weight", "back_bn.weight"]
    assert penalty_of(model, ignore=[model.stem], all_bn=True).names == [
        "inner_bn.weight",
        "head_bn.weight",
    ]


def test_an_analysis_is_taken_as_it_is():
    model = small()
    penalty = SparsityPenalty(fxprune.analyze(model, images(2)), S)
    assert penalty.names == PRUNABLE and penalty.model is model


def test_a_wrapper_is_taken_off():
    model = small()
    assert penalty_of(nn.DataParallel(model)).model is model


def test_tied_gammas_count_once():
    model = small(Tied)
    penalty = penalty_of(model)
    assert penalty.names == ["bn1.weight"] and len(penalty) == 4
    model.bn1.weight.grad = torch.zeros(4)
    penalty.add_grad()
    torch.testing.assert_close(model.bn2.weight.grad, S * model.bn1.weight.detach().sign())


def test_a_scale_that_is_a_buffer_is_left_out():
    class Fixed(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            del self.weight
            self.register_buffer("weight", torch.ones(channels))

    model = small()
    model.inner_bn = Fixed(5).eval()
    analysis = fxprune.analyze(model, images(2))
    assert "inner_bn.weight" in analysis.flow.ids.slots  # or else this would show nothing
    assert SparsityPenalty(analysis).names == ["stem_bn.weight", "back_bn.weight"]


def test_a_scale_over_blocks_of_channels_is_penalised_in_all_of_them():
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 12), nn.LayerNorm([3, 4]), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x).unflatten(-1, (3, 4))))

    model = Blocks()
    penalty = SparsityPenalty(model, S, example_inputs=torch.randn(2, 3))
    model.norm.weight.grad = torch.zeros(3, 4)
    penalty.add_grad()
    assert len(penalty) == 12 and torch.equal(model.norm.weight.grad, torch.full((3, 4), S))


# -- the formulas ----------------------------------------------------------------------------------


def test_add_grad_is_the_gradient_of_loss():
    one, two = small(), small()
    (task(one, images()) + penalty_of(one).loss()).backward()
    task(two, images()).backward()
    penalty_of(two).add_grad()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_the_gradient_is_s_times_the_sign_and_zero_at_zero():
    model = small()
    model.inner_bn.weight.data = torch.tensor([2.0, -3.0, 0.0, -0.0, 1e-30])
    model.inner_bn.weight.grad = torch.full((5,), 7.0)
    penalty_of(model).add_grad()
    expected = 7 + S * torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(model.inner_bn.weight.grad, expected)


def test_loss_is_s_times_value():
    penalty = penalty_of(small())
    expected = sum(float(gammas(penalty.model)[n].abs().sum()) for n in PRUNABLE)
    assert penalty.value == pytest.approx(expected)
    assert penalty.loss().item() == pytest.approx(S * expected) and penalty.loss().ndim == 0


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)])
def test_prox_shrinks_by_lr_times_s_and_leaves_exact_zeros(lr):
    model = small()
    model.inner_bn.weight.data = torch.tensor([2.0, -3.0, 0.05, -0.04, 0.0])
    penalty_of(model, s=0.1).prox(lr)
    found = model.inner_bn.weight.detach()
    torch.testing.assert_close(found[:2], torch.tensor([1.95, -2.95]))
    assert found[2:].tolist() == [0.0, 0.0, 0.0] and model.inner_bn.weight.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("replace", [False, True])
def test_a_model_may_move_after_the_penalty_was_made(device, dtype, replace):
    model = small(Joined)
    penalty = penalty_of(model)
    torch.__future__.set_overwrite_module_params_on_conversion(replace)
    try:
        old, gamma = model.bn.weight, model.to(device, dtype).bn.weight
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert (gamma is not old) == replace
    gamma.grad, start = torch.zeros_like(gamma), gamma.detach().clone()
    penalty.add_grad()
    part = torch.tensor([1, 1, 1, 1, 0, 0], device=device)
    torch.testing.assert_close(gamma.grad, (S * start.sign() * part).to(dtype))
    penalty.prox(10.0)
    shrunk = start.double().sign() * (start.double().abs() - 10 * S * part).clamp(min=0)
    torch.testing.assert_close(gamma.detach(), shrunk.to(dtype))
    total = float((gamma.detach().double().abs() * part).sum())
    assert gamma.dtype == dtype
    assert penalty.value == pytest.approx(total, rel=1e-6)  # summed wider than fp16
    assert penalty.loss().item() == pytest.approx(S * total, rel=1e-6)


def test_a_mask_moves_with_the_model():
    model = small(Joined)
    penalty, gamma = penalty_of(model), model.to("meta").bn.weight
    gamma.grad = torch.zeros_like(gamma)
    penalty.add_grad()  # fails if one were on another device
    assert penalty.loss().is_meta and penalty.count == 1


def test_frozen_scales_and_those_without_a_gradient_are_left_alone():
    model = small()
    model.stem_bn.weight.requires_grad_(False)
    model.inner_bn.weight.grad = torch.zeros(5)
    start, penalty = gammas(model), penalty_of(model)
    penalty.add_grad()
    assert model.stem_bn.weight.grad is None and model.back_bn.weight.grad is None
    assert model.inner_bn.weight.grad.abs().sum() > 0
    penalty.prox(1.0)
    assert torch.equal(model.stem_bn.weight, start["stem_bn.weight"])
    assert not torch.equal(model.inner_bn.weight, start["inner_bn.weight"])
    for name in PRUNABLE:
        model.get_parameter(name).requires_grad_(False)
    assert penalty.loss().item() == 0


def test_strong_shrinking_leaves_only_what_may_not_go():
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with penalty_of(model, s=20.0).attach(optimizer):
        for _ in range(30):
            optimizer.zero_grad()
            task(model, images()).backward()
            optimizer.step()
    zeros = {name: int((gamma == 0).sum()) for name, gamma in gammas(model).items()}
    assert zeros == dict(zip(PRUNABLE, (6, 5, 6), strict=True)) | {"head_bn.weight": 1}  # as before


# -- around the step -------------------------------------------------------------------------------


def test_attach_adds_one_gradient_a_step():
    def attached(model: nn.Module) -> None:
        handle = penalty_of(model).attach(optimizer := sgd(model))
        assert handle.how == "grad"
        task(model, images()).backward()
        optimizer.step()

    close(after(attached), penalised(after(plain_step)))


def test_attach_is_add_grad_before_each_step():
    def train(model: nn.Module, by_hand: bool) -> None:
        penalty, optimizer = penalty_of(model), sgd(model, momentum=0.9, weight_decay=0.01)
        if not by_hand:
            penalty.attach(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            task(model, images()).backward()
            if by_hand:
                penalty.add_grad()
            optimizer.step()

    one, two = after(lambda m: train(m, True)), after(lambda m: train(m, False))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_accumulated_batches_are_penalised_once():
    def train(model: nn.Module, parts: int) -> None:
        optimizer = sgd(model)
        penalty = penalty_of(model)
        penalty.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            for x in images().double().chunk(parts):
                (task(model, x) / parts).backward()
            optimizer.step()
        assert penalty.count == 3

    double = {"dtype": torch.float64}
    close(after(lambda m: train(m, 4), **double), after(lambda m: train(m, 1), **double))


def test_clipping_does_not_clip_the_penalty():
    def clipped(model: nn.Module, attach: bool) -> None:
        optimizer = sgd(model)
        if attach:
            penalty_of(model).attach(optimizer)
        task(model, images().double()).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert norm > 0.01  # it does clip
        optimizer.step()

    double = {"dtype": torch.float64}
    close(
        after(lambda m: clipped(m, True), **double),
        penalised(after(lambda m: clipped(m, False), **double)),
    )


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_s_gradients_are_penalised_after_it(keyword):
    def train(model: nn.Module) -> None:
        optimizer = sgd(model)
        penalty = penalty_of(model)
        penalty.attach(optimizer)
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # wraps optimizer.step

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = task(model, images())
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss.item() > 0 and penalty.count == 1

    close(after(train), penalised(after(plain_step)))


def test_an_optimizer_that_climbs_is_penalised_downwards():
    def climb(model: nn.Module) -> None:
        optimizer = sgd(model, maximize=True)
        penalty_of(model).attach(optimizer)
        (-task(model, images())).backward()
        optimizer.step()

    close(after(climb), penalised(after(plain_step)))


def test_a_hooked_prox_shrinks_by_the_rate_of_each_parameter_group():
    model = small()
    fast = [model.inner_bn.weight]
    rest = [p for p in model.parameters() if p is not fast[0]]
    start = gammas(model)
    optimizer = torch.optim.SGD([{"params": rest}, {"params": fast, "lr": 0.1}], lr=0.01)
    handle = penalty_of(model).attach(optimizer, how="prox")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.back_bn.weight.grad = None  # the step does not move it, nor does the penalty
    optimizer.step()
    rates = {"stem_bn.weight": 0.01, "inner_bn.weight": 0.1, "back_bn.weight": 0}
    for name, gamma in gammas(model).items():
        by = rates.get(name, 0) * S
        expected = start[name].sign() * (start[name].abs() - by).clamp(min=0)
        torch.testing.assert_close(gamma, expected, rtol=0, atol=1e-7)
    assert handle.how == "prox"


# -- mixed precision -------------------------------------------------------------------------------


def amp_step(way: str, device: str = "cpu", fused: bool = False) -> Callable[[nn.Module], None]:
    """One step with a loss scaled by 2^16."""

    def train(model: nn.Module) -> None:
        optimizer = sgd(model, fused=fused)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
        penalty = penalty_of(model)
        if way.startswith("attach"):
            penalty.attach(optimizer, how=way.split()[1])
        scaler.scale(task(model, images().to(next(model.parameters())))).backward()
        if "unscale" in way:
            scaler.unscale_(optimizer)
        if not way.startswith("attach"):
            penalty.add_grad(scale=scaler.get_scale() if "scaled" in way.split() else 1.0)
        scaler.step(optimizer)
        assert penalty.count == 1

    return train


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["unscale", "scaled", "attach grad", "attach grad unscale"])
def test_a_scaled_loss_does_not_dilute_the_penalty(device, fused, way):
    found = after(amp_step(way, device, fused), device=device)
    close(found, penalised(after(plain_step, device=device)), rtol=1e-5, atol=1e-6)


def test_without_unscaling_the_penalty_would_be_lost():
    found, plain = after(amp_step("naive")), after(plain_step)
    close(
        found, plain, rtol=1e-5, atol=1e-6
    )  # as if there were none: hence the test above can fail
    with pytest.raises(AssertionError):
        close(found, penalised(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["grad", "prox"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_skipped_for_infinite_gradients_is_not_penalised(device, fused, how, unscale):
    model = small().to(device)
    start, optimizer = gammas(model), sgd(model, fused=fused)
    penalty = penalty_of(model)
    penalty.attach(optimizer, how=how)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    for factor in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(task(model, images().to(device)) * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if factor == math.inf:
            assert penalty.count == 0
            close(gammas(model), start, rtol=0, atol=0)
    assert penalty.count == 1  # the hook is still there for the step that is made


# -- optimizers that rescale gradients -------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how"),
    [("SGD", "grad"), ("Adam", "prox"), ("AdamW", "prox"), ("RMSprop", "prox"), ("NAdam", "prox")],
)
def test_the_way_follows_from_the_optimizer(kind, how):
    model = small()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
    assert penalty_of(model).attach(optimizer).how == how


def adam_shrinks(way: str | None) -> Tensor:
    """By how much one step of Adam shrinks gammas of 1, less what it does without L1: for loss
    gradients of 1, 1e-3, 1e-6 and 0."""
    found = []
    for on in (False, True):
        model = small(Joined)
        nn.init.ones_(model.bn.weight)
        optimizer = torch.optim.Adam([model.bn.weight], lr=0.1)
        penalty = penalty_of(model)
        if on and way is None:
            penalty.attach(optimizer)
        model.bn.weight.grad = torch.tensor([1.0, 1e-3, 1e-6, 0.0, 0.0, 0.0])
        if on and way == "add_grad":
            penalty.add_grad()
        optimizer.step()
        found.append(model.bn.weight.detach()[:4].clone())
    return found[0] - found[1]


def test_adam_shrinks_alike_by_prox_and_not_by_an_added_gradient():
    torch.testing.assert_close(adam_shrinks(None), torch.full((4,), 0.1 * S))
    added = adam_shrinks("add_grad")
    assert added[0].abs() < 1e-6  # drowned in a large gradient
    assert added[3] == pytest.approx(0.1, rel=1e-4)  # blown up to lr where there is none


# -- several processes -----------------------------------------------------------------------------


def _train_apart(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store, patience = dist.FileStore(f"{folder}/store", 2), timedelta(seconds=90)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    try:
        model = nn.parallel.DistributedDataParallel(small().double())
        _three_steps(model, images().double().chunk(2)[rank])
        torch.save(gammas(model.module), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _three_steps(model: nn.Module, x: Tensor) -> None:
    optimizer = sgd(model, momentum=0.9)
    with penalty_of(model).attach(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            task(model, x).backward()
            optimizer.step()


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)
def test_two_processes_train_as_one(tmp_path: Path):
    spawn = torch.multiprocessing.get_context("spawn")
    other = spawn.Process(target=_train_apart, args=(1, str(tmp_path)))
    other.start()
    _train_apart(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = after(lambda model: _three_steps(model, images().double()), dtype=torch.float64)
    close(first, second, rtol=0, atol=0)
    close(first, alone)


# -- on, off, and on again -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["grad", "prox"])
def test_remove_turns_it_off(how):
    model = small()
    penalty, optimizer = penalty_of(model), sgd(model)
    zero = {p: torch.zeros_like(p) for p in model.parameters()}
    for p in zero:
        p.grad = zero[p].clone()
    handle = penalty.attach(optimizer, how=how)
    optimizer.step()
    handle.remove()
    handle.remove()  # does nothing
    kept = gammas(model)
    for p in zero:
        p.grad = zero[p].clone()
    optimizer.step()
    close(gammas(model), kept, rtol=0, atol=0)
    assert penalty.count == 1 and kept["stem_bn.weight"].ne(gammas(small())["stem_bn.weight"]).any()
    penalty.attach(optimizer).remove()


def test_a_with_block_turns_it_off_even_after_an_error():
    model = small()
    penalty, optimizer = penalty_of(model), sgd(model)
    with pytest.raises(ZeroDivisionError), penalty.attach(optimizer):
        raise ZeroDivisionError
    penalty.attach(optimizer)


def test_a_dropped_optimizer_needs_no_remove():
    model = small()
    penalty = penalty_of(model)
    penalty.attach(sgd(model))
    gc.collect()
    penalty.attach(sgd(model))


def test_attaching_twice_is_refused():
    model = small()
    penalty, optimizer = penalty_of(model), sgd(model)
    handle = penalty.attach(optimizer)
    for other in (optimizer, sgd(model)):
        with pytest.raises(OptionError, match="attached already"):
            penalty.attach(other)
    with pytest.raises(OptionError, match="another penalty") as caught:
        penalty_of(model, only=["inner"]).attach(optimizer)
    assert "inner_bn.weight" in str(caught.value)
    handle.remove()
    penalty_of(model, only=["inner"]).attach(optimizer)
    penalty_of(model, ignore=["inner"]).attach(optimizer)  # other scales: both may be


@pytest.mark.parametrize("call", ["add_grad", "loss", "prox"])
def test_what_would_penalise_twice_is_refused(call):
    model = small()
    penalty, optimizer = penalty_of(model), sgd(model)
    handle = penalty.attach(optimizer)
    args = (0.1,) if call == "prox" else ()
    with pytest.raises(OptionError, match=f"{call} would penalise twice"):
        getattr(penalty, call)(*args)
    handle.remove()
    getattr(penalty, call)(*args)


def test_an_optimizer_that_lacks_a_scale_is_refused():
    model = small()
    rest = [p for n, p in model.named_parameters() if n != "inner_bn.weight"]
    with pytest.raises(OptionError, match=r"1 of the 3 scales") as caught:
        penalty_of(model).attach(torch.optim.SGD(rest, lr=0.1))
    assert "inner_bn.weight" in str(caught.value)
    with pytest.raises(OptionError, match="3 of the 3"):
        penalty_of(model).attach(sgd(copy.deepcopy(model)))
    model.inner_bn.weight.requires_grad_(False)
    penalty_of(model).attach(torch.optim.SGD(rest, lr=0.1))  # a frozen one need not be there


def test_frozen_scales_alone_cannot_be_attached():
    model = small()
    for name in PRUNABLE:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(OptionError, match="all 3 scales are frozen"):
        penalty_of(model).attach(sgd(model))


# -- strength over time ----------------------------------------------------------------------------


def test_schedules():
    assert [warmup(4)(n) for n in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert warmup(0)(0) == 1
    assert [round(cosine(4)(n), 4) for n in (0, 1, 2, 3, 4, 9)] == [1, 0.8536, 0.5, 0.1464, 0, 0]


def test_each_way_counts_an_update():
    model = small()
    penalty = penalty_of(model, s=1.0, schedule=warmup(4))
    seen = [penalty.s]
    for count in (penalty.add_grad, lambda: penalty.prox(0.1), penalty.step):
        count()
        seen.append(penalty.s)
    assert seen == [0, 0.25, 0.5, 0.75]
    assert penalty.loss().item() == pytest.approx(0.75 * penalty.value)
    assert penalty.s == 0.75  # a look and a loss count nothing


@pytest.mark.parametrize("how", ["grad", "prox"])
def test_hooked_steps_follow_the_schedule(how):
    model = small()
    nn.init.ones_(model.inner_bn.weight)
    optimizer = sgd(model)
    penalty_of(model, schedule=lambda count: (1, 0, 10)[count]).attach(optimizer, how=how)
    for shrunk in (1, 1, 11):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(model.inner_bn.weight, torch.full((5,), 1 - LR * S * shrunk))


def test_a_resumed_penalty_goes_on_where_it_was():
    model = small()
    old = penalty_of(model, s=2.0, schedule=warmup(4))
    old.step()
    new = penalty_of(model, s=1.0, schedule=warmup(4))
    new.load_state_dict(old.state_dict())
    assert (new.count, new.s) == (1, 0.5)


def test_repr_is_short():
    penalty = penalty_of(small(), s=2e-5)
    penalty.step()
    assert repr(penalty) == "SparsityPenalty(s=2e-05: 17 gammas in 3 scales, 1 update)"


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: penalty_of(m, s=-1.0), "s=-1.0 is not"),
        (lambda m: penalty_of(m, s=math.nan), "s=nan is not"),
        (lambda m: penalty_of(m, s=math.inf), "s=inf is not"),
        (lambda m: penalty_of(m, s="1e-4"), "s is a str"),
        (lambda m: penalty_of(m, s=True), "s is a bool"),
        (lambda m: penalty_of(m, schedule=0.5), "schedule is a float"),
        (lambda m: penalty_of(m, schedule=lambda n: -1.0).s, "factor after 0 updates=-1.0"),
        (lambda m: penalty_of(m, schedule=lambda n: None).add_grad(), "updates is a NoneType"),
        (lambda m: penalty_of(m).prox(-0.1), "lr=-0.1"),
        (lambda m: penalty_of(m).attach(m), "Optimizer is needed, not Small"),
        (lambda m: penalty_of(m).attach(sgd(m), how="proxy"), "how='proxy' is not known"),
        (lambda m: penalty_of(m).attach(torch.optim.LBFGS(m.parameters())), "LBFGS"),
        (lambda m: penalty_of(m).load_state_dict({"count": 1}), "no state of"),
        (lambda m: penalty_of(m).load_state_dict({"count": -1, "s": 1.0}), "count=-1"),
        (lambda m: penalty_of(m).load_state_dict({"count": 1, "s": -1.0}), "s=-1.0"),
        (lambda m: penalty_of(m, only=["nosuch"]), "matches nothing"),
        (lambda m: penalty_of(m, only=["head"]), "no scale to penalise|leave no scale"),
        (lambda m: penalty_of(m, ignore=["*"]), "leave no scale"),
        (lambda m: penalty_of(nn.Conv2d(3, 4, 1)), "no normalisation layer"),
        (lambda m: warmup(-1), "steps=-1"),
        (lambda m: cosine(0), "steps=0"),
        (lambda m: cosine(1.5), "steps=1.5"),
    ],
)
def test_what_cannot_be_used_is_refused(call, message):
    with pytest.raises(OptionError, match=message):
        call(small())


def test_scales_of_channels_that_stay_are_named_as_such():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(OptionError, match="no scale belongs to channels that may go") as caught:
        penalty_of(model)
    assert "all_bn=True" in caught.value.hint and "output" in str(caught.value)
    assert penalty_of(model, all_bn=True).names == ["1.weight"]


def test_a_model_that_lost_a_scale_is_refused():
    model = small()
    penalty = penalty_of(model)
    model.inner_bn = nn.Identity()
    with pytest.raises(ModelError, match=r"no parameter `inner_bn.weight` any more"):
        penalty.add_grad()


def test_what_is_no_model_is_refused():
    with pytest.raises(FxpruneError):
        SparsityPenalty(3)
