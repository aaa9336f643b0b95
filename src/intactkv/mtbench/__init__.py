"""MT-Bench: two-turn answers of three arms, graded by a judge that the user names."""
