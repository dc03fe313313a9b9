"""SLA's trained part: side files, the projections they hold, and how these reach a transformer."""
