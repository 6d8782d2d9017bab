"""Training methods, each a file with its formula, its loss and its METHOD."""

from rter.methods import advmoe, dual, fast_at, jtdmoe, mart, nine_experts, pgd_at, rt_er, standard, trades
from rter.methods.method import Method
from rter.methods.rt_er import FAITHFUL

__all__ = ["FAITHFUL", "METHODS", "Method"]

METHODS = {
    "standard": standard.METHOD,
    "pgd-at": pgd_at.METHOD,
    "trades": trades.METHOD,
    "mart": mart.METHOD,
    "fast-at": fast_at.METHOD,
    "advmoe": advmoe.METHOD,
    "rt-er": rt_er.METHOD,
    "dual": dual.METHOD,
    "jtdmoe": jtdmoe.METHOD,
    "nine-experts": nine_experts.METHOD,
}
