"""What runs in the owner's house: verbs, local work, memory."""
