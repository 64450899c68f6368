"""Rules of retention: which blocks stay when there are more than the persistent set holds; one module each.

Every module here is imported, so a new file with a decorated class is a new rule (docs/memory.md).
"""

from __future__ import annotations

import importlib
import pkgutil

from sparse_forcing.memory.retention.base import RULES, BlockView, RetentionRule, find_rule, rule

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["RULES", "BlockView", "RetentionRule", "find_rule", "rule"]
