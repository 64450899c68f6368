"""Rules of retention: which blocks stay when there are more than the persistent set holds; one module each."""

from __future__ import annotations

from sparse_forcing.memory.retention import mass, paper
from sparse_forcing.memory.retention.base import RULES, BlockView, RetentionRule, find_rule, rule

__all__ = ["RULES", "BlockView", "RetentionRule", "find_rule", "mass", "paper", "rule"]
