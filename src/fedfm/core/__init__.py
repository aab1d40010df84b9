"""The ground: nouns, the round, keys, trees, errors, registry, plan check. Imports nothing from the rooms."""
