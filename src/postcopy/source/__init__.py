"""The side that has the guest."""
