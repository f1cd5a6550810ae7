"""Training a quantiser block by block, and writing what it decided as integers."""
