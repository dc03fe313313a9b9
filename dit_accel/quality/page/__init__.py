"""The page that readers trust: one HTML file with videos, charts and numbers inside, and nothing beside it."""

from dit_accel.quality.page.report import write_page

__all__ = ["write_page"]
