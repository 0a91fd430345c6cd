def posterize(pixels, low, high):
    """Few colours: each channel is rounded down to a multiple of the lower threshold."""
    step = max(low, 1)
    return pixels // step * step
