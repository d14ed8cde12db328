"""Rows read back against the cache and the images: attention maps, galleries, similarity of layers."""
