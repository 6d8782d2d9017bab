"""Wilson's interval of a part of n images, which has a width also where none or all of them count (Wilson 1927)."""

import math

NORMAL_95 = 1.959964  # standard errors to either side of 95 %


def wilson(part: float, n: int, z: float = NORMAL_95) -> tuple[float, float]:
    """From and to: the shares p with |part - p| <= z sqrt(p (1 - p) / n).

    Args:
        part: share of the n images, 0 to 1.
        z: standard errors to either side.
    """
    shrink = 1 + z**2 / n
    middle = (part + z**2 / (2 * n)) / shrink
    reach = z * math.sqrt(part * (1 - part) / n + z**2 / (4 * n**2)) / shrink
    return min(part, max(0.0, middle - reach)), max(part, min(1.0, middle + reach))  # rounding must not exclude part
