"""What two LoRAs cost: put on, each further image, taken off; side by side with diffusers, and with the floor.

``python benchmarks/adapters.py`` needs the random checkpoint A of SD 1.5's size (``benchmarks/checkpoints.py
build/bench``). Two LoRAs of rank 16 as kohya's scripts make them (every linear layer of the transformers and of the
text encoder), fp16, over bf16 weights, 256×256, 4 steps; diffusers' hot-swap knows no text encoder, so it has the
UNet's part only. The floor: the adapters' bytes read, one fp32 product and sum for each layer, one write of the touched
weights, timed in the same run.

Predicted before the first run: 1.25 times the floor to put on; nothing for a further image; under a millisecond to take
off; diffusers slower at each step, as it computes the low-rank products there.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import safelight
from safelight.request.adapters import Lora

FOLDER = Path(__file__).parents[1] / "build/bench"
RANK = 16
STEPS, SIDE = 4, 256
PARTS = ("attn1", "attn2", "ff.net", "proj_in", "proj_out", "self_attn", "mlp.fc")
ROUNDS = 3
ROOM_GB = 4.5


def write(path: Path, model: Any, seed: int) -> Path:
    """A LoRA of rank 16 over every linear layer of the transformers and the text encoder."""
    if path.exists():
        return path
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for component in model.manifest.components:
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}.get(component.role)
        for tensor in component.tensors if prefix else ():
            module = tensor.name.removesuffix(".weight")
            if not tensor.name.endswith(".weight") or len(tensor.shape) < 2 or not any(p in module for p in PARTS):
                continue
            name, kernel = f"{prefix}{module.replace('.', '_')}", tensor.shape[2:]
            tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, *tensor.shape[1:], generator=generator) * 0.02
            tensors[f"{name}.lora_up.weight"] = torch.randn(tensor.shape[0], RANK, *kernel, generator=generator) * 0.02
            tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path)
    return path


def timed(what: Callable[[], Any]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def floor(paths: list[Path], model: Any) -> float:
    """Seconds for what cannot be left out."""
    shapes = {(c.role, t.name): t.shape for c in model.manifest.components for t in c.tensors}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    names = {
        f"{prefixes[role]}{name.removesuffix('.weight').replace('.', '_')}": shape
        for (role, name), shape in shapes.items()
        if role in prefixes and name.endswith(".weight")
    }
    first = load_file(paths[0])
    touched = {n[: -len(".alpha")]: names[n[: -len(".alpha")]] for n in first if n.endswith(".alpha")}
    base = {name: torch.randn(shape).bfloat16() for name, shape in touched.items()}
    out = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in touched.items()}

    def once() -> None:
        files = [load_file(path) for path in paths]
        for name, weight in base.items():
            total = weight.float()
            for tensors in files:
                down, up = (tensors[f"{name}.lora_{slot}.weight"].float().flatten(1) for slot in ("down", "up"))
                total += (up @ down).view(weight.shape)
            out[name].copy_(total)

    once()
    return min(timed(once) for _ in range(ROUNDS))


def ours(model: str, paths: list[Path]) -> dict[str, float]:
    # Room for the model and two combinations: then their memory is used again, as the floor's is; memory that nobody
    # has touched yet costs more on some machines (0.8 s a GB on the one of docs/speed.md).
    engine = safelight.open_engine(FOLDER / "root", max_cache_ram_gb=ROOM_GB)

    def image(*loras: Lora) -> Any:
        asked = safelight.Request("x", model, steps=STEPS, width=SIDE, height=SIDE, precision="bf16", loras=loras)
        return next(engine.generate(asked))

    both = tuple(Lora(str(path), 0.8) for path in paths)
    image()
    first, further, off, plain = [], [], [], []
    for strength in range(ROUNDS + 2):
        # Another strength is another combination: it is put together anew.
        changed = tuple(Lora(lora.name, 0.8 + strength / 10) for lora in both)
        first.append(image(*changed))
        further.append(image(*changed))
        off.append(image())
        # What it is compared with follows it at once: with more in memory, every plan is some milliseconds longer.
        plain.append(image())
    del first[:2]
    engine.close()

    def switch(images: list[Any]) -> float:
        return statistics.median(made.seconds.switch for made in images)

    def step(images: list[Any]) -> float:
        return min(made.seconds.denoise for made in images) / STEPS

    there = switch(plain)
    return {
        "put on": switch(first) - there,
        "a further image, more": switch(further) - there,
        "take off, more": switch(off) - there,
        "a step without": step(plain),
        "a step with": step(further),
    }


def theirs(folder: Path, paths: list[Path], way: str) -> dict[str, float]:
    import diffusers

    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    kind: Any = diffusers.StableDiffusionPipeline
    pipe = kind.from_pretrained(folder, torch_dtype=torch.bfloat16, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def image() -> float:
        call = {"num_inference_steps": STEPS, "width": SIDE, "height": SIDE, "output_type": "latent"}
        return timed(lambda: pipe("x", generator=torch.Generator().manual_seed(0), **call)) / STEPS

    image()
    plain = min(image() for _ in range(ROUNDS))
    if way == "hotswap":
        pipe.enable_lora_hotswap(target_rank=RANK)
        unets = [{k: v for k, v in load_file(path).items() if k.startswith("lora_unet_")} for path in paths]
        pipe.load_lora_weights(unets[0], adapter_name="a")
        on = timed(lambda: pipe.load_lora_weights(unets[1], adapter_name="a", hotswap=True))
        return {"put on": on, "a step without": plain, "a step with": min(image() for _ in range(ROUNDS))}

    def put_on() -> None:
        for number, path in enumerate(paths):
            pipe.load_lora_weights(str(path), adapter_name=str(number))
        pipe.set_adapters(["0", "1"], [0.8, 0.8])
        if way == "fused":
            pipe.fuse_lora()

    def take_off() -> None:
        if way == "fused":
            pipe.unfuse_lora()
        pipe.unload_lora_weights()

    on = timed(put_on)
    step = min(image() for _ in range(ROUNDS))
    return {"put on": on, "take off, more": timed(take_off), "a step without": plain, "a step with": step}


def prepared() -> tuple[Any, list[Path]]:
    """The model A and the two LoRAs, made where they are not there."""
    engine = safelight.open_engine(FOLDER / "root")
    model = engine.library.find(str(FOLDER / "A.safetensors"))
    paths = [write(FOLDER / f"lora{n}.safetensors", model, n) for n in (1, 2)]
    for path in paths:
        engine.catalog.adapters.find(str(path))
    engine.close()
    return model, paths


def main() -> None:
    model, paths = prepared()
    least = floor(paths, model)
    print(f"two LoRAs of {paths[0].stat().st_size / 1e6:.0f} MB each; the floor to put both on: {least:.3f} s\n")
    print("| | put on, s | times the floor | take off, ms | a further image, ms more | a step without, s | with |")
    print("|---|---|---|---|---|---|---|")
    rows = {"Safelight": ours(model.name if model.origin != "path" else str(model.path), paths)}
    rows |= {f"diffusers, {way}": theirs(FOLDER / "A", paths, way) for way in ("set_adapters", "fused", "hotswap")}
    for name, found in rows.items():
        off, more = found.get("take off, more"), found.get("a further image, more")
        cells = [f"{found['put on']:.3f}", f"{found['put on'] / least:.2f}"]
        cells += ["" if value is None else f"{value * 1000:.1f}" for value in (off, more)]
        cells += [f"{found['a step without']:.3f}", f"{found['a step with']:.3f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
