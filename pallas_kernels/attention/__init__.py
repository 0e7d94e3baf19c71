"""Attention of scattered queries, each at its own position: interface, reference, and one file per backend."""
