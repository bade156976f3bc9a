"""What Torch-Pruning makes of one network of a zoo, set up as its documentation recommends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.zoo_networks import Network, tensors

Record = dict[str, Any]
Say = Callable[[str], None]
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def pruned_by_torch_pruning(network: Network, record: Record, say: Say) -> Any:
    """Prune by half, local, by group magnitude; the result (which is the network's own model) and
    what was kept of every parameter, or None."""
    import torch_pruning as tp

    model = network.model
    how = recipe(network)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    common.settle_memory()
    before = common.memory()
    say("prune")
    start, result = time.perf_counter(), None
    try:
        with Recorder(model) as recorder:
            importance = tp.importance.GroupMagnitudeImportance(p=2)
            pruner = tp.pruner.BasePruner(
                model, network.args, importance=importance, pruning_ratio=0.5, **how
            )
            pruner.step()
        result = model
    except Exception as error:
        record["verdict"] = f"error: {type(error).__name__}"
        record["why"] = (str(error).strip() or "no message").splitlines()[0][:300]
    record["seconds"] = record["seconds_unverified"] = time.perf_counter() - start
    record["memory"] = record["memory_unverified"] = max(common.peak_since_reset() - before, 0)
    if result is None:
        return None
    corrected(model, how["num_heads"])
    record["params"] = [record["params"][0], sum(p.numel() for p in model.parameters())]
    return result, recorder.kept()


def warm_torch_pruning() -> None:
    """Import everything, and prune a network of three layers. Fused attention is switched off in
    timm, as the tool's own examples do: what it looks at has no name there."""
    import timm.layers
    import torch_pruning as tp

    timm.layers.set_fused_attn(False)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(
        net.eval(), torch.randn(1, 3, 8, 8), importance=importance, ignored_layers=[net[3]],
        in_channel_groups={}, out_channel_groups={},
    ).step()  # fmt: skip


# -- how it is set up ------------------------------------------------------------------------------


def recipe(network: Network) -> Record:
    """Layers to ignore, and how many heads layers have."""
    model = network.model
    mha = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        "ignored_layers": ignored(network),
        "num_heads": {m.qkv: m.num_heads for m in attentions(model)},
        "in_channel_groups": {},
        "out_channel_groups": mha,
    }


def attentions(model: nn.Module) -> Iterator[Any]:
    """Modules with heads whose queries, keys and values one layer makes."""
    for module in model.modules():
        heads, qkv = getattr(module, "num_heads", None), getattr(module, "qkv", None)
        if isinstance(heads, int) and isinstance(qkv, LAYERS):
            yield module


def corrected(model: Any, heads: dict[nn.Module, int]) -> None:
    """The widths that forward reads from attributes, which users are told to set by hand."""
    for module in attentions(model):
        if module.qkv in heads:
            module.num_heads = heads[module.qkv]
            width = getattr(module.qkv, "out_features", None) or module.qkv.out_channels
            module.head_dim = width // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):
                module.attn_dim = module.head_dim * module.num_heads
    if type(model).__module__ == "torchvision.models.vision_transformer":
        model.hidden_dim = model.conv_proj.out_channels


def ignored(network: Network) -> list[nn.Module]:
    """The layers that give the outputs: those as wide as an output; of a detector, and for optical
    flow, the parts that the tool's examples name."""
    if network.kind in ("detection", "optical_flow"):
        return [part for name in PARTS[_kind(network)] for part in _parts(network.model, name)]
    with torch.no_grad():
        outputs = tensors(network.model(*network.args))
    widths = {t.shape[-1 if t.ndim == 3 else min(1, t.ndim - 1)] for t in outputs if t.ndim}
    return [m for m in network.model.modules() if isinstance(m, LAYERS) and _width(m) in widths]


def _width(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


RPN = ("rpn.head.cls_logits", "rpn.head.bbox_pred")
PARTS = {
    "ssd": ("head",),
    "fasterrcnn": (*RPN, "backbone.fpn", "roi_heads"),
    "keypointrcnn": (
        *RPN, "backbone.fpn.layer_blocks", "roi_heads.box_head", "roi_heads.box_predictor",
        "roi_heads.keypoint_predictor",
    ),
    "maskrcnn": (*RPN, "roi_heads.box_predictor", "roi_heads.mask_predictor"),
    "fcos": (
        "head.classification_head.cls_logits", "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    ),
    "retinanet": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
    "raft": ("corr_block", "update_block", "mask_predictor"),
}  # fmt: skip


def _kind(network: Network) -> str:
    short = network.name.split(":")[1]
    return next(kind for kind in PARTS if short.startswith(kind))


def _parts(model: nn.Module, name: str) -> list[nn.Module]:
    found = model
    for key in name.split("."):
        found = getattr(found, key)
    return [found] if isinstance(found, nn.Module) else []


# -- what it kept ----------------------------------------------------------------------------------


class Recorder(contextlib.AbstractContextManager):
    """Notes which indices of every parameter are left, in terms of the original's, by listening to
    the one function through which the tool slices parameters."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.left: dict[int, tuple[Tensor, dict[int, Tensor]]] = {
            id(p): (p, {}) for p in model.parameters()
        }

    def __enter__(self) -> Recorder:
        from torch_pruning.pruner.function import BasePruningFunc

        self.owner, self.real = BasePruningFunc, BasePruningFunc._prune_parameter_and_grad
        recorder, real = self, self.real

        def listen(self: Any, weight: Tensor, keep_idxs: Any, pruning_dim: int) -> Tensor:
            made = real(self, weight, keep_idxs, pruning_dim)
            recorder.note(weight, made, keep_idxs, pruning_dim)
            return made

        self.owner._prune_parameter_and_grad = listen
        return self

    def __exit__(self, *error: Any) -> None:
        self.owner._prune_parameter_and_grad = self.real

    def note(self, old: Tensor, new: Tensor, keep: Any, dim: int) -> None:
        """Indices of indices, where a parameter is cut more than once along a dim."""
        dim %= old.ndim
        _, known = self.left.get(id(old), (old, {}))
        before = known.get(dim, torch.arange(old.shape[dim]))
        self.left[id(new)] = (new, {**known, dim: before[torch.as_tensor(keep)]})

    def kept(self) -> dict[str, dict[int, list[int]]]:
        """Of every parameter that lost anything."""
        found = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            _, left = self.left.get(id(parameter), (parameter, {}))
            if left:
                found[name] = {dim: rows.tolist() for dim, rows in left.items()}
        return found
