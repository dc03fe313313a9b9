"""Steps that several caches share."""
