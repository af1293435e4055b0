"""EfficientNet-Lite0 of plain convolutions, and the weights that a package ships."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastpeft.cli import assets

# kernel, stride of the first, channels, blocks, of each stage; expansion 6 but in the first.
STAGES = ((3, 1, 16, 1), (3, 2, 24, 2), (5, 2, 40, 2), (3, 2, 80, 3), (5, 1, 112, 3), (5, 2, 192, 4), (3, 1, 320, 1))
MEAN = STD = 0.5  # of the pixels, in 0 to 1, that its weights were trained on


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    """A convolution padded as TensorFlow pads images of even size: with stride 2, one more to the right and below."""
    made = nn.Conv2d(inputs, outputs, kernel, stride, 0 if stride == 2 else kernel // 2, groups=groups, bias=False)
    if stride == 1:
        return made
    less = (kernel - 2) // 2
    return nn.Sequential(nn.ZeroPad2d((less, kernel - 2 - less) * 2), made)


class Block(nn.Module):
    """Wider, convolved channel by channel, and narrow again."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide, self.skips = inputs * expansion, stride == 1 and inputs == outputs
        if expansion > 1:
            self.expand_conv, self.bn0 = conv(inputs, wide), nn.BatchNorm2d(wide, eps=1e-3)
        self.depthwise_conv, self.bn1 = conv(wide, wide, kernel, stride, groups=wide), nn.BatchNorm2d(wide, eps=1e-3)
        self.project_conv, self.bn2 = conv(wide, outputs), nn.BatchNorm2d(outputs, eps=1e-3)
        self.expansion = expansion

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.bn0(self.expand_conv(x))) if self.expansion > 1 else x
        y = nn.functional.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.skips else y


class EfficientNetLite(nn.Module):
    """Images [B, 3, side, side] of even side to logits."""

    def __init__(self, classes: int, stages: tuple[tuple[int, int, int, int], ...] = STAGES, last: int = 1280) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = conv(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        blocks, width = [], 32
        for stage, (kernel, stride, channels, count) in enumerate(stages):
            for index in range(count):
                blocks.append(Block(width, channels, kernel, stride if index == 0 else 1, 6 if stage else 1))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1 = conv(width, last), nn.BatchNorm2d(last, eps=1e-3)
        self.fc = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.relu6(self.bn0(self.conv_stem(images)))
        x = nn.functional.relu6(self.bn1(self.conv_head(self.blocks(x))))
        return self.fc(x.mean((2, 3)))


def pretrained(classes: int, cache: Path | None) -> EfficientNetLite:
    """ImageNet's weights and a new head for `classes`."""
    file = next(iter(assets.EFFICIENTNET.checked))
    saved = torch.load(assets.fetch(assets.EFFICIENTNET, cache) / file, weights_only=True)
    model = EfficientNetLite(classes)
    own, named = model.state_dict(), {}
    for name, value in saved.items():
        name = ".".join(part.lstrip("_") for part in name.split("."))
        # A convolution that has its padding before it is the second of two.
        named[name if name in own else name.replace(".weight", ".1.weight")] = value
    named |= {name: own[name] for name in ("fc.weight", "fc.bias")}
    model.load_state_dict(named)
    return model
