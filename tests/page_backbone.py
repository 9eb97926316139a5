"""LayoutLMv2 sees its pages through detectron2, which must be built from its source; in the tests one convolution is there."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.layoutlmv2 import modeling_layoutlmv2


class PageBackbone(nn.Module):
    """Pictures [batch, 3, height, width] -> [batch, places, channels]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        rows, columns, channels = config.image_feature_pool_shape
        self.cfg = SimpleNamespace(MODEL=SimpleNamespace(PIXEL_MEAN=[0.0] * 3, PIXEL_STD=[1.0] * 3))
        for statistic in ("pixel_mean", "pixel_std"):
            self.register_buffer(statistic, torch.ones(3, 1, 1), persistent=False)
        self.convolution = nn.Conv2d(3, channels, 4, stride=4)
        self.pool = nn.AdaptiveAvgPool2d((rows, columns))

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.convolution(images)).flatten(2).transpose(1, 2)


class Frozen(nn.Module):
    """A kind that transformers looks for when it initialises."""


def stand_in() -> None:
    stock: Any = modeling_layoutlmv2
    if not stock.is_detectron2_available():
        stock.requires_backends = lambda *_: None
        stock.detectron2 = SimpleNamespace(layers=SimpleNamespace(FrozenBatchNorm2d=Frozen))
        stock.LayoutLMv2VisualBackbone = PageBackbone


stand_in()
