"""What the zoo's processes are forked off: everything imported, and every rule read."""

import contextlib
import importlib
import warnings

import torch

from benchmarks.zoo_ours import warm_fxprune

warnings.simplefilter("ignore")
torch.set_num_threads(1)
for name in ("benchmarks.zoo", "timm", "torchvision", "torch_pruning"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
warm_fxprune()
