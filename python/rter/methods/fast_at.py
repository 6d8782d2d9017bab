"""Fast adversarial training: L = CE(F(x1), y) + lambda balance(x), with x1 = one FGSM step of 1.25 eps, random start.

`--train-attack n-fgsm` or `fgsm-pgi` takes another single step. Held-out images are measured under the run's PGD, so
that a collapse to robustness against single steps alone is noticed (`--collapse`), and best.safetensors is from before
it. The defaults, a strong weight decay and exploring to the end, were the most robust of about ten tried on the digits.

Source: Wong, Rice and Kolter, Fast is better than free, ICLR 2020.
"""

from rter.methods.passes import Pass
from rter.methods.pgd_at import make_loss

PASSES = (Pass(make_loss),)
