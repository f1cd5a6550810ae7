"""Finding the strength of a repair: the search, its limits, and the run on held-out prompts."""
