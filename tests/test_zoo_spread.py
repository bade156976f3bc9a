"""A fixed spread of torchvision's and timm's networks, pruned and judged by benchmarks/zoo.py's own
code on small images. The whole zoos take hours: `make zoo-all`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import zoo

# 0: the network's own image size
SPREAD = {
    "torchvision:efficientnet_b0": 64,
    "torchvision:lraspp_mobilenet_v3_large": 64,
    "torchvision:mc3_18": 32,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:quantized_mobilenet_v2": 64,
    "torchvision:quantized_shufflenet_v2_x0_5": 64,
    "torchvision:raft_small": 0,
    "torchvision:regnet_y_400mf": 64,
    "torchvision:resnet18": 64,
    "torchvision:squeezenet1_1": 64,
    "torchvision:swin_t": 64,
    "timm:convnext_zepto_rms": 64,
    "timm:convnextv2_atto": 64,
    "timm:cs3darknet_focus_s": 64,
    "timm:cspnext_tiny": 64,
    "timm:dla46x_c": 64,
    "timm:edgenext_xx_small": 64,
    "timm:efficientvit_b0": 64,
    "timm:efficientvit_m0": 64,
    "timm:fasternet_t0": 64,
    "timm:ghostnet_050": 64,
    "timm:gmlp_ti16_224": 64,
    "timm:hgnetv2_b0": 64,
    "timm:iformer_t": 64,
    "timm:levit_128s": 64,
    "timm:mixnet_s": 64,
    "timm:mobilevit_xxs": 64,
    "timm:mobilevitv2_050": 64,
    "timm:pit_ti_224": 64,
    "timm:pvt_v2_b0": 64,
    "timm:repvit_m1": 64,
    "timm:resnetblur18": 64,
    "timm:rexnet_100": 64,
    "timm:shvit_s1": 64,
    "timm:skresnet18": 64,
    "timm:vit_tiny_patch16_224": 64,
    "timm:vit_tiny_r_s16_p8_224": 64,
    # detectors, whose forward depends on the values of tensors
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn": 96,
    "torchvision:retinanet_resnet50_fpn": 96,
    "torchvision:ssdlite320_mobilenet_v3_large": 0,
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name, side", SPREAD.items())
def test_it_is_pruned_by_half_and_computes_the_masked_original(name, side):
    record = zoo.measure(name, "fxprune", lambda record: None, side)
    assert (record["verdict"], record["why"]) == ("ok", "")
    assert record["check"]["verdict"] == "same", record["check"]
    before, after = record["params"]
    assert after <= 0.5 * before
    assert record["prunable"] >= 0.7 * (record["channels"] - record["outputs"])
