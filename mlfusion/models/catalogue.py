"""The catalogue of models: rows of data."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the catalogue."""

    name: str
    source: str  # hub id, or "embedded:<folder>" for what ships with the package
    family: str
    depth: int  # transformer blocks, L
    width: int  # channels per token, D
    image_px: int
    patch_px: int
    about: str
    revision: str | None = None  # commit on the hub; None is the newest

    @property
    def embedded(self) -> Path | None:
        """The folder of a model that ships with the package."""
        if not self.source.startswith("embedded:"):
            return None
        return Path(__file__).parent.parent / "embedded" / self.source.removeprefix("embedded:")


def _row(name: str, source: str, family: str, depth: int, width: int, patch_px: int, about: str) -> Row:
    return Row(
        name=name, source=source, family=family, depth=depth, width=width, image_px=224, patch_px=patch_px, about=about
    )


EMBEDDED = "formula-vit"

CATALOGUE: dict[str, Row] = {
    row.name: row
    for row in [
        Row(
            name=EMBEDDED,
            source="embedded:formula-vit",
            family="ViT",
            depth=8,
            width=128,
            image_px=48,
            patch_px=8,
            about="ships with mlfusion; pre-trained on images made by formula",
        ),
        # The study's eleven. Its ViT-B is the augreg2 checkpoint of timm; the hub's `google/` ones are augreg.
        _row("clip-vit-b32", "openai/clip-vit-base-patch32", "CLIP", 12, 768, 32, "study"),
        _row("clip-vit-b16", "openai/clip-vit-base-patch16", "CLIP", 12, 768, 16, "study"),
        _row("clip-vit-l14", "openai/clip-vit-large-patch14", "CLIP", 24, 1024, 14, "study"),
        _row("dinov2-vit-s14", "facebook/dinov2-small", "DINOv2", 12, 384, 14, "study"),
        _row("dinov2-vit-b14", "facebook/dinov2-base", "DINOv2", 12, 768, 14, "study"),
        _row("dinov2-vit-l14", "facebook/dinov2-large", "DINOv2", 24, 1024, 14, "study"),
        _row("vit-s16", "WinKawaks/vit-small-patch16-224", "ViT", 12, 384, 16, "study; supervised"),
        _row("vit-b16", "google/vit-base-patch16-224", "ViT", 12, 768, 16, "study; supervised"),
        _row("vit-l16", "google/vit-large-patch16-224", "ViT", 24, 1024, 16, "study; supervised"),
        _row("mae-vit-b16", "facebook/vit-mae-base", "MAE", 12, 768, 16, "study; masked autoencoder"),
        _row("mae-vit-l16", "facebook/vit-mae-large", "MAE", 24, 1024, 16, "study; masked autoencoder"),
        _row(
            "deit-ti16", "facebook/deit-tiny-patch16-224", "ViT", 12, 192, 16, "DeiT-Ti, supervised, 5.7 M parameters"
        ),
        _row("deit-s16", "facebook/deit-small-patch16-224", "ViT", 12, 384, 16, "DeiT-S, supervised, 22 M parameters"),
    ]
}
