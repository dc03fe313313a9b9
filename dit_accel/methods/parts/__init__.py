"""Steps that methods share: score (what matters), force (what is always kept), budget (how many)."""
