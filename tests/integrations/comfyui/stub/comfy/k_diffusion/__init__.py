"""Samplers: from noise to latents, one level after another."""
