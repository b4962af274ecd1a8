"""Pictures as rasters of [-1, 1], from memory and from files, and back."""
