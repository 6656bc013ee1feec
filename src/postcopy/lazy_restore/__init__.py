"""Start a guest from an image, its memory behind it."""
