"""Classification of one's own images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from headprune.errors import InvalidInput
from headprune.evaluation.tasks.labelled import Example, Labelled
from headprune.evaluation.tasks.rows import parts_of, place_of, refuse_counts
from headprune.evaluation.tasks.task import register_task

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@register_task
class ImageClassification(Labelled):
    """Classification of your own images: calibration=FOLDER with a folder for each class, and test=FOLDER or a tenth of it.

    The folders' names are the labels (ImageNet's layout). test: the same; by default a tenth of calibration's images, which then
    count for nothing else. training: the same, for recovery; by default the images of calibration. Images are read by the model
    folder's image processor. seed: which images are drawn for calibration.
    """

    name = "image-classification"
    more = "test=FOLDER (and test_images, where you gave it)"
    reads = "images"

    def __init__(
        self,
        tokenizer: Any,
        calibration: str,
        test: str | None = None,
        training: str | None = None,
        calibration_images: int = 256,
        test_images: int = 1024,
        training_images: int = 2048,
        batch: int = 16,
        seed: int = 0,
    ) -> None:
        refuse_counts(calibration_images=calibration_images, test_images=test_images, training_images=training_images)
        parts = parts_of(
            images_in, calibration, test, training, calibration_count=calibration_images, test_count=test_images, seed=seed
        )
        super().__init__(tokenizer, parts.calibration, parts.test, parts.training[:training_images], batch)

    def token_kinds(self) -> None:
        return None

    def inputs(self, examples: list[Any]) -> Mapping[str, Tensor]:
        from PIL import Image  # comes with every image processor

        images = []
        for path in examples:
            try:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            except OSError as error:
                raise InvalidInput(f"{path} cannot be read as an image: {error}.") from None
        return {"pixel_values": self.tokenizer(images, return_tensors="pt")["pixel_values"]}


def images_in(source: str) -> list[Example]:
    """(path of an image, its folder's name), in the order of their names."""
    folder = place_of(source)
    found: list[tuple[Path, str]] = [
        (path, path.parent.name) for path in sorted(folder.glob("*/*")) if path.suffix.lower() in IMAGES
    ]
    if not found:
        raise InvalidInput(f"{folder} holds no FOLDER/IMAGE ({', '.join(IMAGES)}); expected a folder of images for each class.")
    return list(found)
