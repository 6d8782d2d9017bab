"""Adversarially robust Mixture-of-Experts: train, evaluate, report."""

import os

# torch reads this when it first allocates: with it, large tensors on a CPU come in huge pages, where the system lends
# them on request. Page by page, a seventh of an RT-ER step of ResNet-18 experts went to page faults.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
