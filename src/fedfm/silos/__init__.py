"""A consortium of real silos: its coordinator's folder, its members, its broker, and how a member enters it."""
