"""Engines: tiny models, real processes that serve them, weight groups, workers around them."""
