"""The channels of multifd at both ends."""
