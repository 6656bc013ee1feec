"""The engine's process: what runs in it, and how it is told."""
