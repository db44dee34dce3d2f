"""mmpretrain."""
from .rules import Rule

RULES: dict[str, Rule] = {}
