"""Figures of merit, by what they look at."""
