"""Vectors, spectra, ranks and projectors: pure tensor functions. No files, no models."""
