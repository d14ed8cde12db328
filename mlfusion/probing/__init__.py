"""Stage 2: tokens in the store to probes, scores and rows. Opens no image and no model."""
