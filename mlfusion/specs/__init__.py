"""What is meant, as frozen values and words."""
