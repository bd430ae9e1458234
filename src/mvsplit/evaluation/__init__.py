"""Judging trained networks."""
