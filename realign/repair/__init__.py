"""Plan, validate, apply, verify, commit: the one engine that every repair method runs through."""
