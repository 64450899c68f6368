"""Weights: loaded safely, verified by hash, converted from the original layouts."""
