"""Blending of cached with fresh KV: interface, reference, and one file per backend."""
