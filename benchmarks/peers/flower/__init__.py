"""Flower's simulation. What is here runs in Flower's environment and imports nothing of fedfm."""
