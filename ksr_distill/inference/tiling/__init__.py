"""Tiles: where they lie, their noise, and a pass over all of them."""
