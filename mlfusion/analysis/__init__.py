"""Analyses of results with the cache and the images: attention maps, galleries, similarity of layers."""
