"""Intervals of a part of n images, and of the difference between two such parts."""

import math

NORMAL_95 = 1.959964  # standard errors to either side of 95 %


def wilson(part: float, n: int, z: float = NORMAL_95) -> tuple[float, float]:
    """From and to: the shares p with |part - p| <= z sqrt(p (1 - p) / n) (Wilson 1927).

    It has a width also where none or all of the images count.

    Args:
        part: share of the n images, 0 to 1.
        z: standard errors to either side.
    """
    shrink = 1 + z**2 / n
    middle = (part + z**2 / (2 * n)) / shrink
    reach = z * math.sqrt(part * (1 - part) / n + z**2 / (4 * n**2)) / shrink
    return min(part, max(0.0, middle - reach)), max(part, min(1.0, middle + reach))  # rounding must not exclude part


def paired(first: int, second: int, n: int, z: float = NORMAL_95) -> tuple[float, float, float]:
    """The difference between the parts of the same n images that count for one model and for another; from and to.

    Wald's interval for matched pairs after half an image is added to each of the four cells, which keeps its level also
    where few images tell the two apart (Agresti and Min, Simple improved confidence intervals for comparing matched
    proportions, 2005).

    Args:
        first: images that count for the first model alone.
        second: for the second alone.
        z: standard errors to either side.
    """
    total, gap, apart = n + 2, first - second, first + second + 1
    reach = z * math.sqrt(apart - gap**2 / total) / total
    return gap / n, max(-1.0, gap / total - reach), min(1.0, gap / total + reach)
