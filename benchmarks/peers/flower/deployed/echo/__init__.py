"""Members that answer with what they were sent, in Flower."""
