"""A checkpoint that runs: loading, chat, generation, log-probabilities, moments, training."""
