"""The laboratory: trains small model families in which safety drift is real, and measures them."""
