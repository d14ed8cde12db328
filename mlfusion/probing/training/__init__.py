"""Training of heads: a grid of configurations in lockstep."""
