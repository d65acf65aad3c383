"""What runs a detector as a black box, and what its outputs mean."""
