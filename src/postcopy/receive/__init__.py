"""A migration of a stock QEMU that arrives as an image."""
