"""Stage 2: cached tokens → probes, scores and rows. This stage opens no image and no model."""
