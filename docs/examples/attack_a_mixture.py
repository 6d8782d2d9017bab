"""A mixture of your own networks, attacked expert by expert: `python docs/examples/attack_a_mixture.py`.

An image withstands only if no attack breaks it. Attacks on an expert together with the route to it find what attacks on
the model as a whole leave.
"""

import torch
from adversarial_training import CNN, EPS, digits
from torch import Tensor, nn

from moe_kernels import APGD, PGD, ExpertAttack, JointAttack, RobustMoE, RouterLogits, SoftBackward


def train(model: RobustMoE, x: Tensor, y: Tensor, epochs: int, batch: int = 128) -> None:
    """Adversarial training of all experts on what the router sends them."""
    attack = PGD(model, eps=EPS, alpha=EPS / 4, steps=10, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            x_adv = attack(x[rows], y[rows])
            routing = model.route(x_adv)
            loss = nn.functional.cross_entropy(model(x_adv, routing=routing), y[rows])
            optimizer.zero_grad()
            (loss + 0.1 * routing.balance_loss()).backward()
            optimizer.step()


def main(epochs: int = 20, steps: int = 50, test_images: int = 360, num_experts: int = 4) -> dict[str, float]:
    """Returns the part of the images that each attack leaves standing, and all of them together."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    x_test, y_test = x_test[:test_images], y_test[:test_images]
    experts = [CNN(8) for _ in range(num_experts)]
    router = nn.Sequential(nn.Flatten(), nn.Linear(64, num_experts))
    model = RobustMoE.from_experts(experts, router, gate="straight_through")
    train(model, x, y, epochs)
    model.eval()

    clean = model.route(x_test)
    pgd = PGD(model, eps=EPS, alpha=EPS / 4, steps=steps, seed=1)
    route_only = APGD(RouterLogits(model), EPS, steps=steps, loss="margin", seed=1)
    left: dict[str, float] = {}
    with torch.no_grad():
        standing = model(x_test).argmax(1) == y_test
    left["no attack"] = standing.float().mean().item()

    def judge(name: str, x_adv: Tensor) -> None:
        """By what the whole model says under its own route."""
        with torch.no_grad():
            right = model(x_adv).argmax(1) == y_test
        left[name] = right.float().mean().item()
        standing.logical_and_(right)

    judge("PGD on the model", pgd(x_test, y_test))
    for e in range(num_experts):
        judge(f"PGD on expert {e}", pgd(x_test, y_test, routing=clean.fixed(e)))
    judge("the route alone", route_only(x_test, clean.experts[:, 0].long()))
    judge("soft gradient", APGD(SoftBackward(model), EPS, steps=steps, loss="margin", seed=1)(x_test, y_test))
    judge("each expert and its route", ExpertAttack(model, EPS, steps=steps, seed=1)(x_test, y_test))
    judge("the weakest expert and its route", JointAttack(model, EPS, steps=steps, seed=1)(x_test, y_test))
    left["all of them together"] = standing.float().mean().item()
    for name, part in left.items():
        print(f"{name:34}{part:.1%}")
    return left


if __name__ == "__main__":
    main()
