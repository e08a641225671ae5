"""Sweeps: a grid of recipes, and the table that it ends in."""
