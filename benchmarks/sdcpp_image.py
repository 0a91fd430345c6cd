"""One image of FLUX.1 by stable-diffusion.cpp, for ``benchmarks/forms.py --part flux --peer``. Prints figures as JSON.

It runs in an environment of its own, which has the package stable-diffusion-cpp-python and not Safelight.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path


def resident() -> tuple[int, int]:
    """Bytes of anonymous memory, and of all that is resident: also files that are mapped into memory."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(found[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]


def main() -> None:
    import stable_diffusion_cpp  # type: ignore[import-not-found]

    folder, side, mapped = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "mapped"
    most, stop, steps = [0, 0], threading.Event(), list[float]()

    def look() -> None:
        while not stop.wait(0.01):
            most[:] = map(max, most, resident())

    def note(step: int, count: int, seconds: float) -> None:
        del step, count
        steps.append(seconds)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    start = time.perf_counter()
    made = stable_diffusion_cpp.StableDiffusion(
        diffusion_model_path=str(folder / "diffusion_models/transformer.gguf"),
        clip_l_path=str(folder / "text_encoders/text_encoder.safetensors"),
        t5xxl_path=str(folder / "text_encoders/text_encoder_2.gguf"),
        vae_path=str(folder / "vae/vae.safetensors"),
        n_threads=2,
        enable_mmap=mapped,
        verbose=False,
    )
    made.generate_image(
        "a cat",
        width=side,
        height=side,
        sample_steps=2,
        cfg_scale=1.0,
        seed=1,
        progress_callback=note,
    )
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    figures = {"seconds": seconds, "a step": steps[-1], "peak GB": most[0] / 2**30, "with files GB": most[1] / 2**30}
    print("\n" + json.dumps(figures))


if __name__ == "__main__":
    main()
