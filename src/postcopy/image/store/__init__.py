"""A store of chunks that compressed images share."""
