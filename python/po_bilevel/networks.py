"""The networks that policies and rewards are made of."""

from collections.abc import Sequence

from torch import nn


def mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Linear layers with tanh between them: (*, in_features) -> (*, out_features).

    tanh has the continuous second derivatives that implicit hypergradients need; ReLU has none at its kinks.
    """
    layers: list[nn.Module] = []
    width = in_features
    for size in hidden:
        layers += [nn.Linear(width, size), nn.Tanh()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, out_features))
