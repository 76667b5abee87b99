"""`modelhub classify`."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modelhub.cli import options
from modelhub.cli.options import option


def classify(
    images: Annotated[list[str], typer.Argument(help="files")],
    preset: Annotated[str, option("a registry name, a folder or an address")] = "vit_base_patch16_224_imagenet",
    top: Annotated[int, option("how many of the likeliest labels to show")] = 5,
    backend: options.Backend = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Say what is in pictures: the likeliest labels of each, with their probabilities."""
    from modelhub import ImageClassifier
    from modelhub.processing.image_reading import read_images

    read_images(images[:1])  # a mistyped name should not cost the time that loading a model takes
    clf = ImageClassifier.from_preset(preset, backend=backend, device=device, dtype=dtype, offline=offline)
    found = clf.predict(images, top=top)
    if as_json:
        rows = [
            {"image": image, "labels": [{"label": label, "probability": share} for label, share in labels]}
            for image, labels in zip(images, found, strict=True)
        ]
        print(json.dumps(rows))
        return
    for image, labels in zip(images, found, strict=True):
        table = Table(show_header=False, box=None, title=escape(image), title_justify="left")
        table.add_column(justify="right")
        for label, share in labels:
            table.add_row(f"{share:.1%}", escape(label))
        Console(soft_wrap=True).print(table)
