"""Confidence intervals for a fraction of n images, and for the difference between two such fractions."""

import math

NORMAL_95 = 1.959964  # standard errors to either side of 95 %


def wilson(part: float, n: int, z: float = NORMAL_95) -> tuple[float, float]:
    """(low, high): the fractions p with |part - p| <= z sqrt(p (1 - p) / n) (Wilson 1927).

    The interval has a width even if none or all of the images count.

    Args:
        part: observed fraction of the n images, 0 to 1.
        z: standard errors to either side.
    """
    shrink = 1 + z**2 / n
    middle = (part + z**2 / (2 * n)) / shrink
    reach = z * math.sqrt(part * (1 - part) / n + z**2 / (4 * n**2)) / shrink
    return min(part, max(0.0, middle - reach)), max(part, min(1.0, middle + reach))  # rounding must not exclude part


def paired(first: int, second: int, n: int, z: float = NORMAL_95) -> tuple[float, float, float]:
    """(difference, low, high) between the fractions of the same n images that count for one model and for another.

    Wald's interval for matched pairs after adding half an image to each of the four cells, which keeps its level even
    if few images tell the two models apart (Agresti and Min, Simple improved confidence intervals for comparing matched
    proportions, 2005).

    Args:
        first: number of images that count for the first model alone.
        second: number of images that count for the second model alone.
        z: standard errors to either side.
    """
    total, gap, apart = n + 2, first - second, first + second + 1
    reach = z * math.sqrt(apart - gap**2 / total) / total
    return gap / n, max(-1.0, gap / total - reach), min(1.0, gap / total + reach)
