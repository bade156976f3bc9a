"""What an original can, its pruned network can: other formats, compilers, precisions, layouts.

Small networks run always, larger ones of each kind with ``-m slow``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
vision = torchvision.models
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Awkward(nn.Module):
    """Sizes and dtypes written into the code: what a rewriting touches."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.left, self.right = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.mix = nn.Conv2d(32, 16, 1, groups=2)
        self.head = nn.Linear(16 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x.to(self.stem.weight.dtype))))
        a, b = torch.split(x, [8, 8], dim=1)
        y = torch.cat([self.left(a), self.right(b)], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        ramp = torch.arange(w, device=x.device).to(x.dtype) / w
        y = F.max_pool2d(torch.relu(self.mix(y * ramp)) + x, 2)
        return self.head(y.reshape(-1, 16 * 4 * 4))


def _densenet() -> nn.Module:
    return vision.DenseNet(8, (2, 2), 16, num_classes=10)


def _vit() -> nn.Module:
    return vision.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)


def _swin() -> nn.Module:
    sizes = dict(img_size=32, window_size=4, patch_size=2, embed_dim=32)
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, depths=(2, 2), num_heads=(2, 4), num_classes=10, **sizes)


SMALL: dict[str, Any] = {
    "awkward": Awkward,
    "resnet20": lambda: fxprune.models.resnet20(),
    "densenet": _densenet,
    "vit": _vit,
    "shufflenet": lambda: vision.shufflenet_v2_x0_5(num_classes=10),
}
LARGE: dict[str, Any] = {
    "resnet18": lambda: vision.resnet18(num_classes=10),
    "mobilenet_v2": lambda: vision.mobilenet_v2(num_classes=10),
    "mobilenet_v3": lambda: vision.mobilenet_v3_small(num_classes=10),
    "regnet": lambda: vision.regnet_y_400mf(num_classes=10),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=10),
    "swin": _swin,
}
NETS = {**SMALL, **LARGE}
SIDES = {"awkward": 8}
LEAST = 1e-4


@dataclass(frozen=True)
class Case:
    pruned: Any
    x: Tensor
    y: Tensor


@cache
def case(name: str) -> Case:
    """A pruned network, three images, and what it makes of them. Shared: tests change copies."""
    torch.manual_seed(0)
    side = SIDES.get(name, 32)
    model = NETS[name]().eval()
    with torch.no_grad():
        model.train()(torch.rand(16, 3, side, side))  # statistics of norms that are not all equal
    pruned: Any = fxprune.prune(model.eval(), torch.rand(2, 3, side, side), rate=0.5)
    assert pruned.fxprune.report.params[1] < 0.6 * pruned.fxprune.report.params[0]
    x = torch.rand(3, 3, side, side)
    with torch.no_grad():
        return Case(pruned, x, pruned(x))


ALL = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
every = pytest.mark.parametrize("name", ALL)


def close(found: Any, wanted: Tensor, least: float = LEAST) -> None:
    found = torch.as_tensor(found)
    assert found.shape == wanted.shape
    assert (found.float() - wanted).abs().max() <= least * wanted.abs().max()


def batches(x: Tensor) -> Iterator[Tensor]:
    """Other batch sizes than the network was traced and exported with."""
    yield from (x, x[:1], torch.cat([x, x.flip(0)[:2]]))


@pytest.fixture(autouse=True)
def _quiet():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of what will change
        yield


# -- any batch -------------------------------------------------------------------------------------


@every
def test_batches_of_any_size(name):
    found = case(name)
    with torch.no_grad():
        for x in batches(found.x):
            one_by_one = torch.cat([found.pruned(each[None]) for each in x])
            close(found.pruned(x), one_by_one)


# -- ONNX ------------------------------------------------------------------------------------------


def by_onnxruntime(file: bytes, x: Tensor) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return found


HEAVY = {"shufflenet"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in {*LARGE, *HEAVY} else name
        for name in NETS
    ],
)
def test_onnx_of_any_batch(name):
    pytest.importorskip("onnxscript")
    found = case(name)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(
        found.pruned, (found.x,), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    file = program.model_proto.SerializeToString()
    for x in batches(found.x):
        close(by_onnxruntime(file, x), found.pruned(x).detach())


def test_onnx_of_one_batch_size():
    pytest.importorskip("onnxscript")
    found = case("awkward")
    program = torch.onnx.export(found.pruned, (found.x,), dynamo=True, verbose=False)
    close(by_onnxruntime(program.model_proto.SerializeToString(), found.x), found.y)


@every
@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_by_torchscript(name, dynamic):
    """PyTorch reads the names of a graph's outputs in its own way, so they have to be given."""
    pytest.importorskip("onnx")
    found, file = case(name), io.BytesIO()
    names: Any = dict(input_names=["x"], output_names=["y"])
    axes = {"x": {0: "batch"}, "y": {0: "batch"}} if dynamic else None
    torch.onnx.export(found.pruned, (found.x,), file, dynamo=False, dynamic_axes=axes, **names)
    for x in batches(found.x) if dynamic else [found.x]:
        close(by_onnxruntime(file.getvalue(), x), found.pruned(x).detach())


# -- other graphs ----------------------------------------------------------------------------------


@every
def test_torch_export_with_any_batch(name):
    found = case(name)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(found.pruned, (found.x,), dynamic_shapes=({0: batch},))
    for x in batches(found.x):
        close(exported.module()(x), found.pruned(x))


def test_torch_export_of_any_image_size():
    found = case("resnet20")
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(found.pruned, (found.x,), dynamic_shapes=(sizes,)).module()
    x = torch.rand(2, 3, 48, 40)
    close(exported(x), found.pruned(x))


def test_an_exported_file_is_read_again(tmp_path):
    found = case("awkward")
    torch.export.save(torch.export.export(found.pruned, (found.x,)), tmp_path / "net.pt2")
    close(torch.export.load(tmp_path / "net.pt2").module()(found.x), found.y)


@every
def test_torchscript(name):
    found = case(name)
    scripted = torch.jit.script(found.pruned)
    for x in batches(found.x):
        close(scripted(x), found.pruned(x))


@every
def test_torchscript_by_tracing(name):
    found = case(name)
    traced = torch.jit.freeze(torch.jit.trace(found.pruned, (found.x,)))
    for x in batches(found.x):
        close(traced(x), found.pruned(x))


def test_scripted_files_are_read_again():
    found, file = case("awkward"), io.BytesIO()
    torch.jit.save(torch.jit.script(found.pruned), file)
    file.seek(0)
    close(torch.jit.load(file)(found.x), found.y)


@every
def test_symbolic_trace_again(name):
    found = case(name)
    again = fx.symbolic_trace(found.pruned)
    close(again(found.x), found.y)
    assert again.state_dict().keys() >= found.pruned.state_dict().keys()


@pytest.mark.parametrize("name", ["resnet20", "densenet", "shufflenet"])
def test_norms_are_folded_into_convolutions(name):
    from torch.fx.experimental.optimization import fuse

    found = case(name)
    folded = fuse(copy.deepcopy(found.pruned))
    close(folded(found.x), found.y)
    count = [
        sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in (found.pruned, folded)
    ]
    assert count[1] < count[0]


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in {*LARGE, *HEAVY} else name
        for name in NETS
    ],
)
def test_compiled_as_one_graph(name):
    found = case(name)
    compiled = torch.compile(found.pruned, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(found.x), found.y)


@pytest.mark.parametrize("name", ["awkward", pytest.param("densenet", marks=pytest.mark.slow)])
def test_compiled_for_any_batch(name):
    """No batch size is compiled anew that the original is not compiled anew for."""
    found = case(name)
    sizes = [torch.cat([found.x, found.x])[:n] for n in (3, 6, 2, 5)]
    counts = [_compilations(net, sizes) for net in (NETS[name]().eval(), found.pruned)]
    assert counts[0] == counts[1] and counts[1][-1] == counts[1][1]


def _compilations(net: nn.Module, inputs: list[Tensor]) -> list[int]:
    """How many graphs had been compiled after each of the inputs."""
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counted, fullgraph=True, dynamic=True)
    counts = []
    with torch.no_grad():
        for x in inputs:
            close(compiled(x), net(x))
            counts.append(counted.frame_count)
    return counts


@needs_compiler
def test_compiled_by_inductor():
    found = case("awkward")
    with torch.no_grad():
        close(torch.compile(found.pruned, fullgraph=True)(found.x), found.y)


@pytest.mark.parametrize("name", ["awkward", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_a_compiled_training_step_is_the_same(name):
    found = case(name)
    eager, other = copy.deepcopy(found.pruned).train(), copy.deepcopy(found.pruned).train()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for net in (eager, compiled):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        F.cross_entropy(net(found.x), torch.arange(3)).backward()
        optimizer.step()
    for (key, wanted), own in zip(
        eager.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.allclose(own, wanted, atol=1e-4), key


# -- precision and layout --------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)],
    ids=str,
)
def test_other_precisions(name, dtype, least):
    found = case(name)
    net = copy.deepcopy(found.pruned).to(dtype)
    with torch.no_grad():
        y = net(found.x.to(dtype))
    assert y.dtype == dtype
    close(y, found.y, least)


class Wide(nn.Module):
    """Squares in float32 whatever the precision, as language models normalise."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        own = x.dtype
        wide = x.to(torch.float32)
        x = (wide * torch.rsqrt(wide.square().sum(1, keepdim=True))).to(own)
        return self.c(torch.relu(self.b(x)))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="places of calls are not known before")
def test_steps_in_float32_do_not_overflow_in_float16():
    torch.manual_seed(0)
    pruned = fxprune.prune(Wide().eval(), torch.rand(2, 8), rate=0.5, mixing="all")
    assert pruned.fxprune.report.channels[1] < pruned.fxprune.report.channels[0]
    x = 1000 * torch.rand(3, 8)  # whose squares no float16 holds
    with torch.no_grad():
        close(copy.deepcopy(pruned).half()(x.half()), pruned(x), 0.01)


@every
def test_autocast(name):
    found = case(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = found.pruned(found.x)
    assert y.dtype == torch.bfloat16
    close(y, found.y, 0.1)


@every
def test_half_precision_is_saved_and_loaded(name, tmp_path):
    found = case(name)
    net = copy.deepcopy(found.pruned).half()
    fxprune.save(net, tmp_path)
    model = NETS[name]().eval()
    again = fxprune.load(tmp_path, model)
    x = found.x.half()
    with torch.no_grad():
        assert next(again.parameters()).dtype == torch.float16
        assert torch.equal(again.eval()(x), net(x))


@pytest.mark.parametrize("name", [n for n in SMALL if n != "vit"])
def test_channels_last(name):
    """The format is kept by every convolution, also where the pruned network was made from one."""
    found = case(name)
    net = copy.deepcopy(found.pruned).to(memory_format=torch.channels_last)
    x = found.x.to(memory_format=torch.channels_last)
    formats = _formats(net, x)
    assert formats and all(formats)
    with torch.no_grad():
        close(net(x), found.y)


def _formats(net: nn.Module, x: Tensor) -> list[bool]:
    """Whether each convolution's output is laid out channels last."""
    seen: list[bool] = []

    def look(module: nn.Module, args: Any, y: Tensor) -> None:
        seen.append(y.is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    with torch.no_grad():
        net(x)
    return seen


def test_networks_in_channels_last_are_pruned_in_it():
    model = vision.resnet18(num_classes=10).eval().to(memory_format=torch.channels_last)
    pruned = fxprune.prune(model, torch.rand(2, 3, 32, 32), verify="shapes")
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in pruned.parameters()
        if p.ndim == 4
    )


# -- copies, processes, functions ------------------------------------------------------------------


@every
def test_copies_and_pickles(name):
    found = case(name)
    for again in (copy.deepcopy(found.pruned), pickle.loads(pickle.dumps(found.pruned))):
        with torch.no_grad():
            assert torch.equal(again(found.x), found.y)
        assert again.fxprune.plan == found.pruned.fxprune.plan


def _answers(net: nn.Module, x: Tensor, answers: Any) -> None:
    with torch.no_grad():
        answers.put(net(x).numpy())


def test_another_process_runs_it():
    found = case("awkward")
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_answers, args=(found.pruned, found.x, answers))
    worker.start()
    close(answers.get(timeout=120), found.y)
    worker.join()
    assert worker.exitcode == 0


@every
def test_inference_mode(name):
    found = case(name)
    with torch.inference_mode():
        close(found.pruned(found.x), found.y)


@every
def test_replicas_share_the_weights(name):
    found = case(name)
    replica = found.pruned._replicate_for_data_parallel()
    with torch.no_grad():
        close(replica(found.x), found.y)


@every
def test_devices_without_data(name):
    found = case(name)
    y = copy.deepcopy(found.pruned).to("meta")(found.x.to("meta"))
    assert y.is_meta and y.shape == found.y.shape


@every
def test_functional_calls_and_vmap(name):
    found = case(name)
    state = {**dict(found.pruned.named_parameters()), **dict(found.pruned.named_buffers())}

    def one(x: Tensor) -> Tensor:
        return torch.func.functional_call(found.pruned, state, (x[None],))[0]

    with torch.no_grad():
        close(torch.vmap(one, randomness="different")(found.x), found.y)


def test_gradients_of_each_example():
    found = case("awkward")
    params = {n: p.detach() for n, p in found.pruned.named_parameters()}
    buffers = dict(found.pruned.named_buffers())

    def loss(own: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(found.pruned, (own, buffers), (x[None],)).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, found.x)
    net = copy.deepcopy(found.pruned)
    net(found.x).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4), name


# -- GPU -------------------------------------------------------------------------------------------


@needs_gpu
@every
def test_on_a_gpu(name):
    found = case(name)
    net, x = copy.deepcopy(found.pruned).cuda(), found.x.cuda()
    with torch.no_grad(), _full_precision():
        close(net(x).cpu(), found.y, 1e-3)
        close(copy.deepcopy(net).half()(x.half()).cpu(), found.y, 0.02)
        with torch.autocast("cuda", torch.bfloat16):
            close(net(x).cpu(), found.y, 0.1)


@needs_gpu
def test_replicas_on_a_gpu():
    found = case("awkward")
    with torch.no_grad(), _full_precision():
        net = nn.DataParallel(copy.deepcopy(found.pruned).cuda())
        close(net(found.x.cuda()).cpu(), found.y, 1e-3)


@needs_gpu
def test_pruned_on_a_gpu():
    model, x = Awkward().eval().cuda(), case("awkward").x.cuda()
    net = fxprune.prune(model, x, rate=0.5)
    with torch.no_grad(), _full_precision():
        close(net(x).cpu(), copy.deepcopy(net).cpu()(x.cpu()), 1e-3)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
