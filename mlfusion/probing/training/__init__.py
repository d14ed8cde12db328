"""Heads that are trained: a grid of configurations in lockstep."""
