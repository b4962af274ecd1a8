"""Numbers and pictures that say whether one upscaler is better than another."""
