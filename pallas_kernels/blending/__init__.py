"""Blending of cached with fresh KV: interface, reference, and one file a backend."""
