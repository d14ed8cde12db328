"""Stage 1: images and a frozen model to tokens in the store."""
