"""Model folders: shipped, converted, written, and loaded onto a device."""
