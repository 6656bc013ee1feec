"""Chunks that several compressed images share."""
