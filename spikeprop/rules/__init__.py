"""Learning rules: one file each, none of them imports another."""
