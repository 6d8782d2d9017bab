"""Adversarially robust Mixture-of-Experts: train, evaluate, report."""
