"""Continuous batching: requests join and leave one running batch."""
