"""Specifications as frozen values and names: models, data, tokens, probes, options."""
