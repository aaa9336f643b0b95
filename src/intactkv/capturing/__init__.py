"""The full model computes the artifact: which tokens, and what each layer hands to its cache."""
