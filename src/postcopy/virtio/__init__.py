"""What a virtio device and its driver share: rings, feature bits, requests; no transport and no socket."""
