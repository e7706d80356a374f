"""Files -> this rank's weights, and back."""
