"""What a device can hold, and how the networks' weights lie on it."""
