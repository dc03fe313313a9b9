"""Dense attention by the fastest kernel that is present: `attend`, and `choose` / `why_not` that say which."""

from .api import IMPLEMENTATIONS, attend, choose, full_plan, why_not

__all__ = ["IMPLEMENTATIONS", "attend", "choose", "full_plan", "why_not"]
