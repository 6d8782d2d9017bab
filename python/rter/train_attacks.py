"""The training attacks: PGD, or one step of the gradient's sign. Imports no torch.

Sources: fgsm-rs, Wong, Rice and Kolter, Fast is better than free, ICLR 2020. n-fgsm, de Jorge et al., Make Some Noise,
NeurIPS 2022: neither the noise nor the step is clipped to the ball, only to the range of images. fgsm-pgi, Jia et al.,
Prior-Guided Adversarial Initialization for Fast Adversarial Training, ECCV 2022, in its variant FGSM-BP, whose prior
is the previous batch's perturbations, and without its regulariser.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SingleStep:
    """One step of the gradient's sign from a random start, as a `--train-attack`; all lengths in units of eps.

    Args:
        start: radius in which the start is drawn.
        step: length of the step.
        radius: of the ball onto which the result is projected; start + step clips nothing.
        keeps: whether the next batch starts from the perturbations that this one ends with.
    """

    start: float
    step: float
    radius: float
    keeps: bool = False


SINGLE_STEPS: Mapping[str, SingleStep] = {
    "fgsm-rs": SingleStep(start=1, step=1.25, radius=1),
    "n-fgsm": SingleStep(start=2, step=1, radius=3),
    "fgsm-pgi": SingleStep(start=1, step=1, radius=1, keeps=True),
}
TRAIN_ATTACKS = ("pgd", *SINGLE_STEPS)
