"""Put a guest back to a point, again and again."""
