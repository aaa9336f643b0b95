"""A model on disk or on the Hub: what it is, its digest, and the one loader."""
