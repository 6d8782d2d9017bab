"""The dual model's curve: clean and robust accuracy of (1 - alpha) F_S + alpha F_R for alpha from 0 to 1."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rter.models.classifier import DualClassifier

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)  # dense near 1, since F_R's logits are smaller


def alpha_flags(
    model: DualClassifier,
    x: Tensor,
    y: Tensor,
    attack: Callable[[nn.Module], Tensor],
    predict: Callable[[nn.Module, Tensor], Tensor],
) -> Tensor:
    """Attacks the model at each alpha; an image is robust at an alpha if it withstands what was found at all of them.

    Args:
        model: F_D; its alpha is restored.
        x, y: images and labels.
        attack: model -> adversarial images [n, C, H, W] of all images.
        predict: (model, images) -> classes [n].

    Returns:
        [n, alphas, 2] bool: whether each image is classified correctly, and whether it is robust.
    """
    own = model.alpha
    try:
        found = [x]
        for model.alpha in ALPHAS:
            found.append(attack(model))
        flags = []
        for model.alpha in ALPHAS:
            right = torch.stack([predict(model, images) == y for images in found])  # [1 + alphas, n]
            flags.append(torch.stack([right[0], right.all(0)], 1))
    finally:
        model.alpha = own
    return torch.stack(flags, 1)


def alpha_curve(flags: Tensor) -> dict[str, Any]:
    """The curve of all images from their flags [n, alphas, 2].

    Returns:
        points: one [alpha, SA, RA, above] for each alpha, where above is the point's distance in the plane of SA and
        RA from the straight line between the two ends, positive for more SA at the same RA. Choosing F_R at random with
        probability alpha would give points on that line.
        above, least: the largest and smallest distance of the points between the ends.
        greatest: the distance of a model as robust as the better end and without an error on clean images. No point
        exceeds it, if F_S is at least as accurate as F_R and the point's RA is not above that of both ends.
    """
    points = [(sa, ra) for sa, ra in flags.double().mean(0).tolist()]
    start, end = points[0], points[-1]
    above = [_above(point, start, end) for point in points]
    curve = [[alpha, *point, distance] for alpha, point, distance in zip(ALPHAS, points, above, strict=True)]
    greatest = _above((1.0, max(start[1], end[1])), start, end)
    return {"points": curve, "above": max(above[1:-1]), "least": min(above[1:-1]), "greatest": greatest}


def _above(point: tuple[float, float], start: tuple[float, float], end: tuple[float, float]) -> float:
    """Distance of a point from the line from start (F_S) to end (F_R), positive for more SA at the same RA."""
    along = end[0] - start[0], end[1] - start[1]
    away = point[0] - start[0], point[1] - start[1]
    length = math.hypot(*along)
    return (along[1] * away[0] - along[0] * away[1]) / length if length else math.hypot(*away)
