"""The page that readers trust: one HTML file with videos, charts and numbers inside, and nothing beside it."""
