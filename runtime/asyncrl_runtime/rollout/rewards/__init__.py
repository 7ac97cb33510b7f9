"""Rewards: how much a response is worth, determined without blocking or endangering the worker.

Nothing is imported here: reward processes start from this package and must come up fast.
"""
