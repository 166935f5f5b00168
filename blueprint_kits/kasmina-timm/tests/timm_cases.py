"""Small models of each kind with batches and losses.

Test modules that import this are skipped where timm or torchvision cannot be imported.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kasmina_core.testing import LifeCase
from torch import Tensor, nn

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
        import torchvision.models as tv
        from torchvision.models.convnext import CNBlockConfig
        from torchvision.models.regnet import BlockParams as BlockParams
        from torchvision.models.resnet import BasicBlock
        from torchvision.models.vgg import make_layers
except Exception as error:  # a torchvision beside another torch raises a RuntimeError
    pytest.skip(
        f"timm and torchvision cannot be imported: {type(error).__name__}: {error}", allow_module_level=True
    )

from kasmina_timm import GrowingModel, grow

CLASSES = 3
BATCH = 4
SIZE = 32


def created(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def vgg() -> nn.Module:
    # Its classifier has a hundred million parameters: it is replaced before it gets memory.
    with torch.device("meta"):
        model = tv.VGG(make_layers([8, "M", 12, 12, "M"]), init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(12, CLASSES)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def swin() -> nn.Module:
    options = {"img_size": SIZE, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1)}
    return timm.models.SwinTransformer(**options, num_heads=(1, 1), num_classes=CLASSES)  # type: ignore[no-any-return]


def tv_vit() -> nn.Module:
    model = tv.VisionTransformer(SIZE, 8, 2, 2, 16, 32, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # zero at birth: nothing in the model would get a gradient
    return model


@dataclass(frozen=True)
class Case(LifeCase):
    """One kind of model: how to make it, where it grows, and from which blueprint."""

    name: str
    build: Callable[[], nn.Module]
    slot: str
    blueprint: str = "cnn:conv_light"

    def host(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.build()
            # A ConvNeXt's or ViT's logits at birth hardly depend on anything: let them.
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith(("gamma", "layer_scale")):
                        parameter.fill_(0.5)
        return model.eval()

    def batch(self, seed: int = 11) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, CLASSES, (BATCH,), generator=draw)
        return torch.randn(BATCH, 3, SIZE, SIZE, generator=draw), labels

    def images(self) -> Tensor:
        return self.batch()[0]

    def grow(self, host: nn.Module, **options: Any) -> GrowingModel:
        return grow(host, **options)

    def run(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        images, labels = self.batch()
        logits = model(images)
        return F.cross_entropy(logits, labels), logits

    def losses(self, model: nn.Module) -> Tensor:
        images, labels = self.batch(12)
        return F.cross_entropy(model(images), labels, reduction="none")


MLP = "transformer:mlp"
CASES = {
    case.name: case
    for case in (
        Case("timm-resnet", created("test_resnet"), "layer2"),
        Case(
            "timm-convnext", created("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), "stages_1"
        ),
        Case("timm-efficientnet", created("test_efficientnet"), "blocks_1"),
        Case("timm-mobilenet", created("mobilenetv3_small_050"), "blocks_1"),
        Case("timm-swin", swin, "layers_0"),
        Case("timm-vit", created("test_vit", img_size=SIZE, depth=2), "blocks_0", "transformer:attention"),
        Case(
            "torchvision-resnet",
            lambda: tv.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES),
            "layer1",
        ),
        Case(
            "torchvision-convnext",
            lambda: tv.ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=CLASSES),
            "features_1",
        ),
        Case(
            "torchvision-densenet",
            lambda: tv.DenseNet(8, (1, 1, 1, 1), 8, num_classes=CLASSES),
            "features_norm5",  # an in-place ReLU follows
        ),
        Case(
            "torchvision-mobilenet",
            lambda: tv.MobileNetV2(num_classes=CLASSES, width_mult=0.25),
            "features_3",
        ),
        Case("torchvision-vgg", vgg, "features_1"),
        Case("torchvision-vit", tv_vit, "encoder_layers_encoder_layer_0", MLP),
    )
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
