"""ViT-Base from a config, trained from a torch DataLoader, on the backend of your choice.

    python examples/vit_from_scratch.py --backend jax
    python examples/vit_from_scratch.py --attention torch

86 million parameters, mixed bfloat16, plain SGD, random images. With --attention a function of your own, here one of
the framework's, takes the place of ours, on its own backend. It drops no attention weights, so that dropout must be 0
then: attention_probs_dropout_prob is what ours does.

The workers import this file, which is why everything else is below the guard at its end.
"""

import argparse

import torch
from torch.utils.data import DataLoader, Dataset

from modelhub import ImageClassifier, optim

CLASSES = 1000


class RandomImages(Dataset):
    def __init__(self, count, size):
        self.count, self.size = count, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        """Floats are pixels as the model takes them, already normalised."""
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, self.size, self.size, generator=generator)
        return image, int(torch.randint(CLASSES, (), generator=generator))


def attention_of(framework):
    """fn(q, k, v, mask, scale=...), all (batch, heads, tokens, width)."""
    if framework == "torch":
        return torch.nn.functional.scaled_dot_product_attention  # fits as it is
    import jax

    def attention(q, k, v, mask=None, scale=None):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # JAX has the heads behind the tokens
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale).swapaxes(1, 2)

    return attention


def vit(backend, attention=None, tiny=False):
    sizes = {"image_size": 224, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    if tiny:
        sizes = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ImageClassifier.from_config(
        CLASSES,
        **sizes,
        patch_size=16,
        intermediate_size=4 * sizes["hidden_size"],
        class_token=False,  # the head sees the mean over all patches
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0 if attention else 0.1,
        classifier_dropout=0.5,
        backend=attention or backend,
        attention=attention_of(attention) if attention else None,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--attention", choices=["jax", "torch"], help="that framework's, in place of ours")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="2 layers, 32 pixels: to see that it runs")
    args = parser.parse_args()
    if args.attention and args.backend not in (None, args.attention):
        parser.error(f"--attention {args.attention} runs on the backend {args.attention}, not on {args.backend}")

    clf = vit(args.backend, args.attention, args.tiny)
    clf.summary()
    data = DataLoader(
        RandomImages(args.steps * args.batch_size, clf.config.image_size),
        batch_size=args.batch_size,
        num_workers=args.workers,
    )
    clf.compile(optim.SGD(0.01), mixed_precision="mixed_bfloat16")  # the loss is sparse categorical cross entropy
    history = clf.fit(data)  # the progress bar shows the time of each step
    seconds = sorted(step["seconds"] for step in history.steps)[len(history.steps) // 2]
    print(f"{clf.backend}: {seconds:.3f} s a step, loss {history.steps[-1]['loss']:.3f}")


if __name__ == "__main__":
    main()
