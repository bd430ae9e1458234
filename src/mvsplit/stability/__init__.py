"""Measures of the mean mode, how a network is watched, and what is judged and drawn from it."""
