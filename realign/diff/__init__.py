"""What changed between two checkpoints: tensors, layers, spectra, configs, tokenizers.

Reads through the checkpoint room, piece by piece; draws and prints nothing.
"""
