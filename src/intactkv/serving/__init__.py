"""The artifact in other engines; each file imports its own engine only, and nothing of this package but `artifact`."""
