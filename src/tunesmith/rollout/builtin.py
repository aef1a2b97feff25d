"""All rewards that come with the house; importing it fills the table."""

from __future__ import annotations

from tunesmith.rollout import coding, judging, matching, scorers

__all__ = ["coding", "judging", "matching", "scorers"]
