"""Suites, judges, statistics, behaviour, policy and the public report schema."""
