"""Distil few-step super-resolution models, and use them. Import a room, not this package."""

__version__ = "0.1.0"
