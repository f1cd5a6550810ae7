"""A checkpoint that runs: loading, chat rendering, generation, log-probabilities, moments, training."""
