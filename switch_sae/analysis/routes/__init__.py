"""Tokens under other routes and other candidates than their own: behind `regret` and `screening`."""
