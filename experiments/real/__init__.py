"""A real language model and English books without a hub."""
