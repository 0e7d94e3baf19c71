"""Measuring: speed of the modes against each other."""
