"""A new head for your own photos: a folder with a folder per class. Then saved, and loaded with transformers.

    python examples/photos.py photos/ --output my_classifier

The encoder stays as it is and sees each photo once; then an epoch takes a moment.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modelhub import ImageClassifier

parser = argparse.ArgumentParser()
parser.add_argument("photos", type=Path)
parser.add_argument("--output", default="my_classifier")
parser.add_argument("--preset", default="vit_base_patch16_224_imagenet")
parser.add_argument("--backend")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--learning-rate", type=float, default=1e-3)
args = parser.parse_args()

labels = sorted(folder.name for folder in args.photos.iterdir() if folder.is_dir())
clf = ImageClassifier.from_preset(args.preset, labels=labels, backend=args.backend)
clf.compile(learning_rate=args.learning_rate, schedule="cosine")
history = clf.fit(
    args.photos,
    epochs=args.epochs,
    batch_size=16,
    freeze_backbone=True,  # False, and a learning rate of 3e-5, trains everything
    validation_split=0.2,
    on_error="skip",  # broken files are named and left out
)
print(f"right of the photos that were held out: {history.history['val_accuracy'][-1]:.0%}")

photo = sorted((args.photos / labels[0]).iterdir())[0]
for label, probability in clf.predict(photo, top=3):
    print(f"{probability:6.1%}  {label}")

clf.save_to_preset(args.output)
processor = AutoImageProcessor.from_pretrained(args.output)
model = AutoModelForImageClassification.from_pretrained(args.output)
with torch.no_grad():
    logits = model(**processor(Image.open(photo).convert("RGB"), return_tensors="pt")).logits
print(f"transformers says {model.config.id2label[int(logits.argmax())]}")
