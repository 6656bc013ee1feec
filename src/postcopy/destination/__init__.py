"""The side that gets the guest."""
