"""Run the whole path on real photos."""
