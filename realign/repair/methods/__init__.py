"""One file per repair method, each to be read beside its paper."""
