"""Helpers of the tests, in folders by what they stand for. Import them by their full names."""
