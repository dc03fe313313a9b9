"""Measure presets against dense, side by side: `dit-accel bench`. The page is made from `results.Results` alone."""
