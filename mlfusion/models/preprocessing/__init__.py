"""Image preprocessing: the model's own steps, read from its files; they are part of the key.

`steps` computes them and writes them into the key; `finishing` computes the last of them on the model's device; `processors`
reads them from the files of transformers, timm and open_clip, or calls a processor of transformers that has rules of its own.
"""

from mlfusion.models.preprocessing.finishing import Finisher
from mlfusion.models.preprocessing.processors import Preprocessing, TransformersProcessor, read
from mlfusion.models.preprocessing.steps import Steps, from_key

__all__ = ["Finisher", "Preprocessing", "Steps", "TransformersProcessor", "from_key", "read"]
