"""Files to named tensors and back: references, headers, readers, matching, writers. No maths."""
