"""Networks of other libraries as they come, built small from their configurations.

What is wanted of each: it is exact, only what reaches its output stays, its output keeps its class,
and its parameters can be trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import TraceError

torch.set_num_threads(1)

STAGES: dict[str, Any] = {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]}
ENCODER: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
SWIN: dict[str, Any] = {
    "image_size": 64,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


def tensors(value: Any) -> list[Tensor]:
    plain = dict(value) if hasattr(value, "keys") else value
    return [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]


def reasons(model: nn.Module, inputs: Any) -> set[str]:
    """Why channels stay, without the node."""
    return {frozen.reason.partition(" by %")[0] for frozen in fxprune.analyze(model, inputs).frozen}


def assert_pruned(model: nn.Module, inputs: dict[str, Any] | Tensor) -> nn.Module:
    """Prune by half: exact, of the same class and shapes, smaller, and trainable."""
    torch.manual_seed(0)
    given = inputs if isinstance(inputs, dict) else {"x": inputs}
    call = (lambda m: m(**given)) if isinstance(inputs, dict) else (lambda m: m(inputs))
    pruned = fxprune.prune(model.eval(), inputs, rate=0.5)
    report = pruned.fxprune.report
    assert report.verification.difference < 1e-9
    assert report.params[1] < 0.7 * report.params[0]
    expected, got = call(model), call(pruned)
    assert type(got) is type(expected)
    assert [t.shape for t in tensors(got)] == [t.shape for t in tensors(expected)]
    sum(t.sum() for t in tensors(got)).backward()
    assert any(p.grad is not None and p.grad.any() for p in pruned.parameters())
    return pruned


# -- transformers ----------------------------------------------------------------------------------


def image_classifier(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        made = getattr(transformers, f"{name}Config")(**config)
        return getattr(transformers, f"{name}ForImageClassification")(made)

    return build


CLASSIFIERS = {
    "resnet": image_classifier("ResNet", embedding_size=16, **STAGES),
    "convnextv2": image_classifier("ConvNextV2", **STAGES),
    "vit": image_classifier("ViT", image_size=64, **ENCODER),
    "beit": image_classifier("Beit", image_size=64, use_relative_position_bias=True, **ENCODER),
    "swin": image_classifier("Swin", **SWIN),
    "segformer": image_classifier("Segformer", num_attention_heads=[1, 2, 5, 8], **STAGES),
    "mobilevitv2": image_classifier(
        "MobileViTV2", image_size=64, width_multiplier=0.25, base_attn_unit_dims=[64, 96, 128]
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_image_classifiers_of_transformers(name):
    model, inputs = CLASSIFIERS[name](), {"pixel_values": torch.rand(2, 3, 64, 64)}
    assert_pruned(model, inputs)
    # one score a token is split off by mobilevitv2
    assert reasons(model, inputs) <= {"reaches the network's output", "is picked alone"}


def test_a_detector_of_transformers():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(embedding_size=16, out_features=["stage4"], **STAGES)
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone,
        use_pretrained_backbone=False, num_queries=5, d_model=32, encoder_layers=1,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64,
    )  # fmt: skip
    model = transformers.DetrForObjectDetection(config)
    assert_pruned(model, {"pixel_values": torch.rand(2, 3, 64, 64)})


def test_a_segmenter_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_attention_heads=[1, 2, 5, 8], decoder_hidden_size=32, **STAGES
    )
    model = transformers.SegformerForSemanticSegmentation(config)
    assert_pruned(model, {"pixel_values": torch.rand(2, 3, 64, 64)})


def test_weights_normed_along_time():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        conv_dim=[16] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
        vocab_size=8, **ENCODER,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config)
    assert_pruned(model, {"input_values": torch.rand(2, 2000)})


def test_a_cache_among_the_outputs_is_refused_with_a_hint():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0
    )
    model, words = transformers.GPT2LMHeadModel(config), torch.randint(0, 50, (2, 6))
    with pytest.raises(TraceError, match="use_cache=False"):
        fxprune.prune(model, {"input_ids": words})
    assert_pruned(model, {"input_ids": words, "use_cache": False})


# -- ONNX ------------------------------------------------------------------------------------------


def onnx_graph() -> Any:
    """A residual block with a channel shuffle by sizes that the graph computes, as exporters
    write them."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    known = {
        "w1": torch.randn(8, 3, 3, 3), "b1": torch.randn(8), "w2": torch.randn(8, 8, 3, 3),
        "b2": torch.randn(8), "w3": torch.randn(5, 4 * 64), "b3": torch.randn(5),
        "channel": torch.tensor(1), "two": torch.tensor(2), "axes": torch.tensor([1]),
        "begin": torch.tensor([0]), "flat": torch.tensor([0, -1]),
    }  # fmt: skip
    three = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], **three),
        helper.make_node("Relu", ["a"], ["c"]),
        helper.make_node("Conv", ["c", "w2", "b2"], ["d"], **three),
        helper.make_node("Add", ["c", "d"], ["e"]),
        helper.make_node("Shape", ["e"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "channel"], ["width"], axis=0),
        helper.make_node("Div", ["width", "two"], ["half"]),
        helper.make_node("Unsqueeze", ["half", "begin"], ["end"]),
        helper.make_node("Slice", ["e", "begin", "end", "axes"], ["f"]),
        helper.make_node("Reshape", ["f", "flat"], ["g"]),
        helper.make_node("Gemm", ["g", "w3", "b3"], ["y"], transB=1),
    ]
    data = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", data, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("y", data, [2, 5])],
        [numpy_helper.from_array(value.numpy(), name) for name, value in known.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])


def test_graphs_converted_from_onnx():
    onnx2torch = pytest.importorskip("onnx2torch")
    torch.manual_seed(0)
    model, x = onnx2torch.convert(onnx_graph()), torch.rand(2, 3, 8, 8)
    pruned = assert_pruned(model, x)
    assert reasons(model, x) == {"reaches the network's output"}
    weights = {tuple(p.shape) for p in pruned.parameters() if p.ndim == 4}
    assert weights == {(4, 3, 3, 3), (4, 4, 3, 3)}
