"""Prune a small network, then quantize it to 8 bits, and compare with quantizing alone.

    pip install 'fxprune[quantize]'
    python examples/quantize.py [--compile]

Both networks take the usual way of PyTorch: `torch.export`, calibration on some images, conversion
(PT2E, from torchao). That folds each BatchNorm into its convolution. Sizes are those of all weights
and constants. With --compile the networks are also compiled and timed, which needs a C++ compiler
and takes a minute or more.
"""

from __future__ import annotations

import argparse
import copy
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from demo import Data, DigitNet, accuracy, digits, fit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import fxprune


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    """The network with 8-bit weights and activations, whose ranges `images` show."""
    batch = torch.export.Dim("batch")
    graph = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph, quantizer)
    with torch.no_grad():
        for part in images.split(64):
            prepared(part)
    made = convert_pt2e(prepared)
    move_exported_model_to_eval(made)
    return made


def kilobytes(model: Any) -> float:
    """All that has to be stored. What conversion leaves of the old weights, no call reads."""
    tensors = {id(t): t for t in _read(model)}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1000


def _read(model: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a network, of a graph those that its calls read."""
    if not isinstance(model, torch.fx.GraphModule):
        yield from [*model.parameters(), *model.buffers()]
        return
    for node in model.graph.nodes:
        if node.op == "get_attr":
            yield operator.attrgetter(node.target)(model)
        elif node.op == "call_module":
            yield from _read(model.get_submodule(node.target))


def nodes(model: Any, part: str) -> int:
    """How many calls of a graph have `part` in their name."""
    return sum(part in str(node.target) for node in model.graph.nodes)


@torch.no_grad()
def agreement(model: nn.Module, other: nn.Module, data: Data) -> float:
    """The share of test images that both give the same digit."""
    x, _ = data.test
    return float((model(x).argmax(1) == other(x).argmax(1)).float().mean())


def milliseconds(networks: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Compiled, on all test images; the networks take turns."""
    from torch._inductor import config

    with config.patch(freezing=True), torch.no_grad():
        compiled: Any = {name: torch.compile(model) for name, model in networks.items()}
        found = fxprune.latency(compiled, (x,), batch_sizes=(len(x),), budget_s=2.0, threads=1)
    return {each.name: each.median_ms for each in found.measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--compile", action="store_true", help="compile and time the networks")
    args = parser.parse_args()

    warnings.simplefilter("ignore")  # PyTorch's own, of what will change
    torch.manual_seed(0)
    torch.set_num_threads(1)
    console, data = Console(), digits()
    dense = DigitNet()
    with Progress(console=console) as progress:
        fit(dense, data, args.epochs, 2e-3, progress, "training")
        pruned = fxprune.prune(dense, data.test[0][:2], criterion="ratio_sum", rate=args.rate)
        fit(pruned, data, max(args.epochs // 2, 1), 1e-3, progress, "fine-tuning")

    calibration = data.train[0][:256]
    networks: dict[str, nn.Module] = {"dense": dense, "pruned": pruned}
    for name in ("dense", "pruned"):
        networks[f"{name}, 8 bits"] = quantized(copy.deepcopy(networks[name]), calibration)
    times = milliseconds(networks, data.test[0]) if args.compile else {}
    console.print(_table(networks, times, data))
    small: Any = networks["pruned, 8 bits"]
    console.print(f"batch norms left in the graph of 8 bits: {nodes(small, 'batch_norm')}")


def _table(networks: dict[str, nn.Module], times: dict[str, float], data: Data) -> Table:
    table = Table(title="DigitNet")
    for column in ("", "accuracy", "kB", "agrees with 32 bits", *(["ms"] if times else [])):
        table.add_column(column, justify="right" if column else "left")
    whole = kilobytes(networks["dense"])
    for name, model in networks.items():
        size = kilobytes(model)
        same = agreement(model, networks[name.split(",")[0]], data)
        row = [name, f"{accuracy(model, data):.1%}", f"{size:.1f} ({size / whole:.0%})"]
        row.append(f"{same:.1%}" if "8 bits" in name else "")
        table.add_row(*row, *([f"{times[name]:.2f}"] if times else []))
    return table


if __name__ == "__main__":
    main()
