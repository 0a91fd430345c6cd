"""Turn CLIP's byte-pair vocabulary into the tokenizer file that Safelight ships.

``pip download --no-deps open-clip-torch``, unzip ``open_clip/bpe_simple_vocab_16e6.txt.gz`` from the wheel, then
``python tools/make_tokenizer.py bpe_simple_vocab_16e6.txt.gz src/safelight/request/prompts/clip_tokenizer.json``.

The rules (normaliser, splitting pattern, end-of-word suffix) are those of ``transformers.CLIPTokenizer``, which is
OpenAI's ``simple_tokenizer.py`` written for the ``tokenizers`` library; a test compares the two.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

START, END = "<|startoftext|>", "<|endoftext|>"
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order in which CLIP numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]


def build(vocabulary: Path) -> Tokenizer:
    lines = gzip.decompress(vocabulary.read_bytes()).decode().split("\n")
    merges: Any = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    characters = byte_characters()
    tokens = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges] + [START, END]
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) != 49408:
        raise SystemExit(f"{vocabulary}: {len(ids)} tokens, CLIP has 49408")
    tokenizer = Tokenizer(
        BPE(vocab=ids, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, ids[END]), (START, ids[START]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens([START, END])
    return tokenizer


if __name__ == "__main__":
    build(Path(sys.argv[1])).save(sys.argv[2], pretty=False)
