"""A rule for an op of your own: a few lines of YAML, probed by running the op.

    python examples/custom_rule.py

``demo::scale_shift`` is a compiled op as far as fxprune can see: it cannot look inside. Without a
rule, all channels that reach the op stay. With one, they go, and the op's weights follow.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import fxprune
from fxprune.probe import probe

RULES = """
scale_shift:
  dims: "n c *s, c, c -> n c *s"
  operands: [input, scale, shift]
  adds: shift
  scales: scale
  calls: ["torch.ops.demo.scale_shift(input, scale, shift)"]
  samples:
    - {call: torch.ops.demo.scale_shift, inputs: [[2, 3, 5, 7], [3], [3]]}
"""


@torch.library.custom_op("demo::scale_shift", mutates_args=())
def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


@scale_shift.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.scale = nn.Parameter(torch.rand(16))
        self.shift = nn.Parameter(torch.rand(16))
        self.second = nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.demo.scale_shift(self.first(x), self.scale, self.shift)
        return self.second(torch.relu(x))


def main() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.rand(2, 3, 16, 16)
    before = fxprune.analyze(model, x)
    print("without a rule:", *before.warnings, sep="\n  ")

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "my_rules.yaml"
        file.write_text(RULES)
        findings = [str(each) for rule in fxprune.rules.read(file) for each in probe(rule)]
        print("the probe:", *(findings or ["the rule and the op agree"]), sep="\n  ")
        fxprune.rules.load(file)
    print("with the rule:")
    print(fxprune.prune(model, x, rate=0.5).fxprune.report)


if __name__ == "__main__":
    main()
