"""The model that ships with the package, and how it is made: images by formula, and pre-training on them."""
