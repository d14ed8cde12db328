"""The model that ships with the package, and its creation: images by formula, and pre-training on them."""
