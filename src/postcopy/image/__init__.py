"""Image files: their formats, manifests and digests.  Nothing here needs a guest."""
