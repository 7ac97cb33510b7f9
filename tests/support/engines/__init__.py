"""Engines: tiny models, real processes that serve them, weight groups, and workers beside them."""
