"""Steps that methods share: score (how much a block matters), force (what is always kept), budget (how
many)."""
