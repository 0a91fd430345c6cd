"""How long the VAE of SD 1, 2 and XL decodes a picture in bf16 on a CPU, in torch's ways and in Safelight's.

``python benchmarks/decoding.py``: 1024×1024, random weights, the median of three processes each, in turns:

- *torch*: as torch and diffusers do it.
- *rows*: the results of convolutions are copied by rows (:mod:`safelight.boundary.convolutions`).
- *rows, huge pages*: and torch asks for huge pages, as in Safelight's processes (:mod:`safelight.assembly`).

Page faults are those of the second decoding, after the first one of the process. The pictures must be equal.

Predicted from profiles before the first run: *rows* 0.65 times *torch*, with huge pages 0.5 times. torch's copies take
40 % of the time, and the kernel clears memory for 18 %.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time

WAYS = {"torch": "0", "rows": "0", "rows, huge pages": "1"}
"""The ways to decode, with the value of torch's variable for huge pages."""


def decode(way: str, side: int) -> dict[str, float | str]:
    """Decode a picture twice, and return the figures of the second time."""
    import torch

    from safelight.boundary.convolutions import replace_convolutions
    from safelight.boundary.modules import KL_AUTOENCODER

    torch.manual_seed(1)
    blocks = [128, 256, 512, 512]
    vae = KL_AUTOENCODER(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=tuple(blocks),
        layers_per_block=2,
        latent_channels=4,
        mid_block_add_attention=True,
    )
    vae = vae.to(torch.bfloat16).eval()
    if way != "torch":
        replace_convolutions(vae, "")
    latents = torch.randn(1, 4, side // 8, side // 8, dtype=torch.bfloat16)
    with torch.inference_mode():
        vae.decode(latents)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        picture = vae.decode(latents).sample
        seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)
    digest = hashlib.sha256(picture.view(torch.int16).numpy().tobytes()).hexdigest()
    faults = (usage.ru_minflt - before) / 1e6
    return {"s": seconds, "million page faults": faults, "peak GB": usage.ru_maxrss * 1024 / 1e9, "picture": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3, help="processes of which the median is taken")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--one", choices=WAYS, help="decode in this process, and print the figures as JSON")
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(decode(asked.one, asked.side)))
        return
    found: dict[str, list[dict[str, float | str]]] = {way: [] for way in WAYS}
    for _ in range(asked.times):
        for way, huge in WAYS.items():
            environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": huge, "OMP_WAIT_POLICY": "PASSIVE"}
            command = [sys.executable, __file__, "--one", way, "--side", str(asked.side)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    assert len({one["picture"] for each in found.values() for one in each}) == 1
    first = [float(one["s"]) for one in found["torch"]]
    print("| | s | ratio | million page faults | peak GB |\n|---|---|---|---|---|")
    for way, each in found.items():
        ratio = statistics.median(float(one["s"]) / other for one, other in zip(each, first, strict=True))
        names = "s", "million page faults", "peak GB"
        cells = [statistics.median(float(one[name]) for one in each) for name in names]
        print(f"| {way} | {cells[0]:.2f} | {ratio:.2f} | {cells[1]:.2f} | {cells[2]:.2f} |")


if __name__ == "__main__":
    main()
