"""The network whose dumps and explanations are kept as text beside this file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SmallNet(nn.Module):
    """A residual block, a grouped layer, a gate of two halves, a flatten with sizes written in."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.gate = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(6 * 16, 5)
        self._fill()

    def _fill(self):
        """Weights that are the same on every machine."""
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                steps = torch.arange(parameter.numel(), dtype=torch.float64)
                parameter.copy_((steps * (i + 2) * 0.37 + i).sin().view(parameter.shape))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x + self.conv2(x)
        a, b = self.gate(x).chunk(2, 1)
        y = F.adaptive_avg_pool2d(a * torch.sigmoid(b), 4)
        return self.fc(y.view(y.shape[0], 6 * 16))
