"""The peers, each in an environment of its own, so that what they need never mixes with what fedfm needs."""
