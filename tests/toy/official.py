"""Stands for the repository of a paper: the official code of the toy family, whose outputs are recorded."""

import itertools

from torch import Tensor, nn


class Net(nn.Module):
    """A tiny residual network with a second classifier on its first stage."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = (8, 8, 16, 24, 32)
        self.stages = nn.ModuleList(Block(*pair) for pair in itertools.pairwise(widths))
        self.classifier = nn.Linear(32, classes)
        self.second = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return self.classifier(x.mean((2, 3))), self.second(levels[1].mean((2, 3)))


class Block(nn.Module):
    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        stride = 1 if dim == out_dim else 2
        self.a = nn.Sequential(nn.Conv2d(dim, out_dim, 3, stride, 1, bias=False), nn.BatchNorm2d(out_dim), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(out_dim, out_dim, 3, 1, 1, bias=False), nn.BatchNorm2d(out_dim))
        self.skip = nn.Sequential(nn.Conv2d(dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim))
        if stride == 1:
            self.skip = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x)) + self.skip(x)).relu()
