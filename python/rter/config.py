"""Every setting of a run as plain data: its type, default, meaning and section, and its JSON form.

Which values a setting may have, and how its default is chosen, is in rter.settings, which makes every Config.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from typing import Any

from rter.seeds import seed_for

GROUPS = ("run", "model", "data", "attack", "method", "optimisation")
DUAL = ("dual", "jtdmoe")  # methods whose model is a `DualClassifier`


def _setting(default: Any, help: str, group: str) -> Any:
    return dataclasses.field(metadata={"default": default, "help": help, "group": group})


_run, _model, _data, _attack, _method, _optimisation = (functools.partial(_setting, group=group) for group in GROUPS)


def _epochs(fraction: float, epochs: int) -> int:
    """The fraction of the epochs, with a part of an epoch counted as a whole one."""
    return math.ceil(round(fraction * epochs, 6))


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, as checked by `rter.settings.make_config`."""

    seed: int = _run(0, "determines the split, initialisation, shuffling and attack starts")
    epochs: int = _run(50, "passes over the training images; 0 keeps the weights of --init unchanged")
    eval_every: int = _run(5, "epochs between two measurements on the held-out images")

    data: str = _data("digits", "what to train on, see `rter data --help`")
    data_dir: str = _data("data", "folder of the data set's files")
    held_out: int = _data(360, "training images set aside to choose the best weights on, and to test on if the "
                          "data have no test split")  # fmt: skip
    train_images: int = _data(0, "images to train on, drawn by the seed in the proportions of the classes; 0: all")
    image_size: int = _data(0, "size in pixels to which images in separate files are scaled; 0: unchanged")
    augment: str = _data("auto", "changes of training images: none, or some of flip,translateN,cropN,cutoutN; auto: "
                         "none for digits, translate2,cutout8 for svhn, else flip,translate2,cutout8")  # fmt: skip

    num_experts: int = _model(4, "experts; 1 is a dense network")
    model: str = _model("small-conv", "network of an expert")
    width: int = _model(16, "channels of an expert's first layer, or of vit's tokens")
    depth: int = _model(0, "layers of wrn or blocks of vit; the depth of other networks is fixed")
    patch: int = _model(4, "pixels of vit's patches")
    shared_stages: int = _model(0, "stages of resnet18, with the stem, that all experts share; the router then "
                                "gets their output; 0: none, and the router gets the image")  # fmt: skip
    kernels: int = _model(1, "kernels of each 3 x 3 convolution in the stages of resnet18, of which an image gets a "
                          "weighted sum of its own, as in CondConv; 1: an ordinary convolution")  # fmt: skip
    recompute: str = _model("auto", "what a training step recomputes in its backward instead of keeping it, see "
                            "docs/memory.md; auto: the network's own default")  # fmt: skip
    router: str = _model("linear", "network that chooses the expert; pooled is the default with shared stages")
    normalize: str = _model("data", "how the model normalises images: data, by mean and deviation of the training "
                            "images, or given values such as 0.49,0.48,0.45/0.25,0.24,0.26")  # fmt: skip
    init: str = _model("", "file of initial weights: a mixture of RT-ER's public code, or one network for every expert")
    gate: str = _model(
        "straight_through",
        "weight of the chosen expert's logits: its softmax (as in RT-ER's paper), 1 with the softmax's gradient "
        "(straight_through), 1 without any (hard); soft mixes all experts",
    )
    dual_alpha: float = _model(
        0.98, "alpha, weight of the robust model in the dual model (1 - alpha) F_S + alpha F_R; 0.7 in the paper"
    )
    dual_mix: str = _model("logits", "what the dual model mixes: logits, which are unbounded, or probabilities")

    norm: str = _attack("Linf", "norm of the perturbation")
    eps: float = _attack(0.2, "radius of the perturbation, for images in [0, 1]; a number or a fraction such as 8/255")
    alpha_ratio: float = _attack(0.25, "step size of the attack, relative to eps")
    attack_steps: int = _attack(10, "steps of PGD in training and in the measurements on held-out images")
    train_attack: str = _attack("pgd", "attack in training: pgd, or one step of the gradient's sign: fgsm-rs (1.25 eps "
                                "from a uniform start), n-fgsm (eps from noise of 2 eps, not clipped to the ball) or "
                                "fgsm-pgi (eps from the last batch's perturbations)")  # fmt: skip
    collapse: float = _attack(0.5, "a run that trains by single steps has collapsed, and stops, when the held-out "
                              "accuracy under PGD is below this fraction of its best and their 95 % intervals do not "
                              "overlap; 0: never")  # fmt: skip

    method: str = _method("rt-er", "how to train: see the formulas below")
    faithful: bool = _method(False, "use the settings of RT-ER's public code: hard gate, beta 6, none of our additions")
    beta: float = _method(2.0, "beta, weight of the KL term of a method that has one")
    second: str = _method("random", "expert s that RT-ER trains besides the first: any other, or the second-ranked")
    clean_weight: float = _method(1.0, "gamma, weight of the clean cross-entropy of RT-ER's expert s")
    balance_weight: float = _method(1.0, "lambda, weight of the router's balance loss on clean images")
    route_weight: float = _method(0.0, "weight of the router's cross-entropy to its own choice, on images attacked "
                                  "to change that choice")  # fmt: skip
    explore: float = _method(0.5, "fraction of the epochs, after those of --upcycle, in which an image goes at random "
                             "to its first or second expert; for nine-experts, in which the experts train "
                             "independently")  # fmt: skip
    awp_gamma: float = _method(0.0, "AWP, adversarial weight perturbation, on top of any method: its size relative to "
                               "the weights, such as 0.005; 0: none")  # fmt: skip
    awp_warmup: int = _method(10, "epochs before AWP begins")
    upcycle: float = _method(0.0, "fraction of the epochs in which all experts are one: every image goes to the first, "
                             "whose weights the others then start from")  # fmt: skip
    fgsm_reach: float = _method(1.0, "largest radius of the nine experts' FGSM, relative to eps")
    pgd_scale: float = _method(0.2, "the nine experts' PGD takes 10 to 50 steps times this")

    optimizer: str = _optimisation("adamw", "update rule")
    label_smoothing: float = _optimisation(0.0, "fraction of each label that is spread over all classes, in the loss")
    batch_size: int = _optimisation(119, "training images per step, over all processes together")
    lr: float = _optimisation(1.5e-2, "peak of the learning rate")
    schedule: str = _optimisation("one-cycle", "how the learning rate changes over the steps")
    lr_low: float = _optimisation(0.5, "lowest learning rate of the cyclic schedule, relative to lr")
    cycle_steps: int = _optimisation(500, "steps in which the cyclic schedule rises, and then falls")
    drops: str = _optimisation("100,105", "epochs after which the multi-step schedule divides the learning rate by 10")
    weight_decay: float = _optimisation(0.01, "weight decay")
    momentum: float = _optimisation(0.9, "momentum of sgd")
    clip_norm: float = _optimisation(0.0, "norm to which gradients are clipped; 0: no clipping")
    ema: float = _optimisation(0.0, "decay of the EMA, a running mean of the weights that is evaluated and saved in "
                               "their place, such as 0.999; 0: none")  # fmt: skip
    amp: str = _optimisation("none", "autocast in training and its attack; evaluation stays in fp32")

    def upcycling(self, epoch: int) -> bool:
        """Whether all experts are one in an epoch, counted from 0."""
        return epoch < _epochs(self.upcycle, self.epochs)

    def exploring(self, epoch: int) -> bool:
        first = _epochs(self.upcycle, self.epochs)
        return first <= epoch < first + _epochs(self.explore, self.epochs - first)

    @property
    def dual(self) -> bool:
        return self.method in DUAL

    def seed_for(self, *purpose: str | int) -> int:
        """A seed of its own for each purpose, such as ("attack", step), so that no draw depends on earlier ones."""
        return seed_for(self.seed, *purpose)

    def elsewhere(self, data_dir: str) -> "Config":
        """The same run with the data set's files in `data_dir`, as on another machine or from another folder."""
        return dataclasses.replace(self, data_dir=data_dir)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"
