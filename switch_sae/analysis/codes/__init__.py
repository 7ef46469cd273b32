"""Codes that a receiver can decode, and how long they are: behind the analysis `mdl`."""
