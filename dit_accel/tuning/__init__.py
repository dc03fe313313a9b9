"""Tuning: from "how much may it drift?" to a preset, by measuring once and allocating error where it buys most time."""
