"""Finds pictures in which one colour is much stronger than the others."""


def check(latents, pixels):
    means = pixels.float().mean((0, 1)).tolist()
    colour, mean = max(zip(("red", "green", "blue"), means, strict=True), key=lambda pair: pair[1])
    return [f"it is mostly {colour}"] if mean > 1.1 * sorted(means)[1] else []
