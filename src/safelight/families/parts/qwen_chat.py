"""The chat template in which Qwen-Image and Krea 2 give prompts to their text encoders."""

from __future__ import annotations

BEGINNING = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
ENDING = "<|im_end|>\n<|im_start|>assistant\n"
"""What precedes a prompt, and what follows it."""

BEGINNING_TOKENS, ENDING_TOKENS = 34, 5
"""How many tokens these are. The transformers do not read the hidden states of :data:`BEGINNING`."""
