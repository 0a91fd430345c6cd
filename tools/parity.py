"""Write the page about parity with other programs: ``python tools/parity.py docs/parity.md``.

Each row is a group of tests. Each test computes the same with Safelight and with the other program. The page lists all
cases; it is written only if every case passes.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree as ET

HOME = Path(__file__).parents[1]
LARGE = 9
"""Number of cases from which the page shows a full matrix as a product."""

_ROW = re.compile(r"(?<=^test_)(copy|state|load|memory|speed|attention)_\d\d_")
"""The row of docs/corruption.md in the name of a test."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``what`` is compared. ``other``: the program or text with which it is compared. ``exact``: how exactly.
    ``tests``: the pytest names of the tests, with spaces between them.
    """

    what: str
    other: str
    exact: str
    tests: str


ROWS = (
    Row(
        "Text to image: bases × samplers",
        "diffusers' pipelines",
        "bit for bit; one case in bf16, within bf16's rounding",
        "tests/pipeline/test_parity.py",
    ),
    Row(
        "LoRA and related adapters: kinds × tensor names × bases",
        "diffusers with PEFT; PEFT's DoRA; LyCORIS' own modules; for full-rank differences, weight + difference",
        "within the rounding of one fp32 sum",
        "tests/adapters/test_parity.py tests/weights/test_adapter_formulas.py",
    ),
    Row(
        "Textual inversions",
        "diffusers' `load_textual_inversion`",
        "bit for bit",
        "tests/adapters/test_inversion.py::test_pixels_are_those_of_diffusers "
        "tests/adapters/test_inversion.py::test_both_encoders_of_sdxl",
    ),
    Row(
        "Image to image, inpainting: bases × samplers × denoising strengths",
        "diffusers' pipelines",
        "bit for bit",
        "tests/pipeline/test_pictures.py::test_image_to_image tests/pipeline/test_pictures.py::test_inpainting",
    ),
    Row(
        "Instruct-pix2pix: samplers × guidance scales; a prompt that changes between steps",
        "diffusers' `StableDiffusionInstructPix2PixPipeline`",
        "bit for bit",
        "tests/pipeline/test_instructions.py::test_pixels_are_those_of_diffusers "
        "tests/pipeline/test_instructions.py::test_a_picture_of_another_size "
        "tests/pipeline/test_instructions.py::test_a_prompt_that_changes_between_steps",
    ),
    Row(
        "Refiner for the last steps: samplers × shares of the noise levels; from a picture; the refiner alone",
        "diffusers' `StableDiffusionXLPipeline` (or image to image), then its image-to-image pipeline with the refiner",
        "bit for bit",
        "tests/pipeline/test_refiner.py::test_pixels_are_those_of_diffusers "
        "tests/pipeline/test_refiner.py::test_from_a_picture "
        "tests/pipeline/test_refiner.py::test_a_refiner_alone_changes_a_picture",
    ),
    Row(
        "ControlNet: text, image, mask × bases; two at once; a part of the steps; guess mode",
        "diffusers' six ControlNet pipelines, `MultiControlNetModel`",
        "bit for bit",
        "tests/adapters/test_controlnet.py::test_pixels_are_those_of_diffusers "
        "tests/adapters/test_controlnet.py::test_a_part_of_the_steps "
        "tests/adapters/test_controlnet.py::test_two_at_once "
        "tests/adapters/test_controlnet.py::test_more_control_is_guess_mode",
    ),
    Row(
        "Hires fix",
        "diffusers' text-to-image pipeline, then its image-to-image pipeline",
        "bit for bit",
        "tests/pipeline/test_passes.py::test_hires_fix_equals_two_passes_of_diffusers",
    ),
    Row(
        "Decoding in tiles; the text encoder of another checkpoint",
        "diffusers' `enable_tiling`; its pipeline with that encoder",
        "bit for bit",
        "tests/pipeline/test_passes.py::test_state_24_decoding_in_tiles_equals_diffusers_and_changes_no_later_image "
        "tests/pipeline/test_passes.py::test_state_15_after_the_text_encoders_of_another_checkpoint_the_models_own_return",
    ),
    Row(
        "Prompts in compel's syntax: weights, `blend`, `and`, long prompts; SD 1 and SDXL",
        "compel 2.5.1 with the same encoders (it needs an attribute that transformers 5 removed; the test adds it)",
        "bit for bit",
        "tests/pipeline/test_prompts.py::test_prompts_in_compels_syntax_equal_those_of_compel "
        "tests/pipeline/test_prompts.py::test_compels_syntax_for_both_encoders_of_sdxl",
    ),
    Row(
        "Prompts that change between steps: images",
        "diffusers' pipelines with a step callback that changes the embeddings",
        "bit for bit",
        "tests/pipeline/test_prompts.py::test_a_changing_prompt_equals_diffusers_with_embeddings_that_change_between_steps",
    ),
    Row(
        "Prompts that change between steps: texts",
        "the examples in AUTOMATIC1111's documentation",
        "equal text at each step",
        "tests/request/prompts/test_editing.py::test_the_documented_example "
        "tests/request/prompts/test_editing.py::test_every_form",
    ),
    Row(
        "Weights in prompts: `(a:1.2)`, `[b]`, `BREAK`",
        "the examples in AUTOMATIC1111's documentation",
        "equal weight of each token",
        "tests/request/prompts/test_emphasis.py::test_weights "
        "tests/request/prompts/test_emphasis.py::test_break_begins_another_chunk",
    ),
    Row(
        "Z-Image: text, image, mask × denoising strengths; guidance; schedules; bf16; token ids",
        "diffusers' `ZImagePipeline`, `ZImageImg2ImgPipeline`, `ZImageInpaintPipeline`; transformers' chat template",
        "bit for bit",
        "tests/families/zimage/test_parity.py::test_text_to_image "
        "tests/families/zimage/test_parity.py::test_classifier_free_guidance "
        "tests/families/zimage/test_parity.py::test_base_has_its_own_shift_and_defaults "
        "tests/families/zimage/test_parity.py::test_image_to_image "
        "tests/families/zimage/test_parity.py::test_inpainting "
        "tests/families/zimage/test_parity.py::test_schedules "
        "tests/families/zimage/test_parity.py::test_a_long_prompt_is_cut_and_said "
        "tests/families/zimage/test_parity.py::test_bf16 "
        "tests/families/zimage/test_parity.py::test_token_ids",
    ),
    Row(
        "Z-Image: samplers that diffusers' pipeline does not take",
        "a loop of the test over diffusers' schedulers and model",
        "bit for bit",
        "tests/families/zimage/test_parity.py::test_samplers_that_the_pipeline_lacks",
    ),
    Row(
        "Z-Image: LoRA names; fused projections with LoRA, DoRA and LoKr",
        "weight + difference; diffusers' `load_lora_weights`; diffusers' converter of names",
        "bit for bit; for DoRA, LoKr and diffusers' own sum, within one step of 255",
        "tests/families/zimage/test_adapters.py::test_each_naming "
        "tests/families/zimage/test_adapters.py::test_fused_projections "
        "tests/families/zimage/test_adapters.py::test_diffusers_adds_the_same "
        "tests/families/zimage/test_files.py::test_diffusers_converts_the_original_names_to_the_same_tensors",
    ),
    Row(
        "FLUX.1 dev and schnell: text, image, mask × denoising strengths; schedules; bf16; token ids; files; LoRAs",
        "diffusers' `FluxPipeline`, `FluxImg2ImgPipeline`, `FluxInpaintPipeline`, its converter of names; a loop of "
        "the test for the samplers that the pipeline does not take; transformers' T5 tokenizer",
        "bit for bit; fused projections within one step of 255",
        "tests/families/flux/test_parity.py tests/families/flux/test_files.py",
    ),
    Row(
        "FLUX.2 klein, distilled and base: text, guidance, schedules, bf16",
        "diffusers' `Flux2KleinPipeline`",
        "bit for bit",
        "tests/families/flux2/test_parity.py",
    ),
    Row(
        "Chroma, four variants: text, guidance, image, mask × denoising strengths; schedules; bf16; token ids; files; "
        "LoRAs",
        "diffusers' `ChromaPipeline`, `ChromaImg2ImgPipeline`, `ChromaInpaintPipeline`, its converter of names, its "
        "`load_lora_weights`; a loop of the test for the samplers that the pipeline does not take",
        "bit for bit; LoRAs within one step of 255",
        "tests/families/chroma/test_parity.py tests/families/chroma/test_files.py",
    ),
    Row(
        "Qwen-Image: text, image, mask × denoising strengths; guidance; schedules; bf16; token ids; files; LoRAs",
        "diffusers' `QwenImagePipeline`, `QwenImageImg2ImgPipeline`, `QwenImageInpaintPipeline`, its converter of "
        "Wan's names, `load_lora_weights`; a loop of the test for the samplers that the pipeline does not take; "
        "transformers' Qwen2 tokenizer",
        "bit for bit; for DoRA, LoKr and diffusers' own sum of a LoRA, within one step of 255",
        "tests/families/qwen_image/test_parity.py tests/families/qwen_image/test_adapters.py "
        "tests/families/qwen_image/test_files.py::test_diffusers_converts_the_names_of_wan_to_the_same_tensors "
        "tests/families/qwen_image/test_files.py::test_diffusers_draws_the_same_with_an_exported_folder",
    ),
    Row(
        "Qwen-Image: ControlNet: text, guidance; a part of the steps; two pictures; bf16",
        "diffusers' `QwenImageControlNetPipeline`, `QwenImageMultiControlNetModel`",
        "bit for bit",
        "tests/families/qwen_image/test_controlnet.py::test_text_to_image "
        "tests/families/qwen_image/test_controlnet.py::test_guidance "
        "tests/families/qwen_image/test_controlnet.py::test_a_part_of_the_steps "
        "tests/families/qwen_image/test_controlnet.py::test_two_pictures "
        "tests/families/qwen_image/test_controlnet.py::test_bf16",
    ),
    Row(
        "Qwen-Image-Edit, three variants: one to three reference images; guidance; bf16; published sizes; pictures, "
        "positions",
        "diffusers' `QwenImageEditPipeline`, `QwenImageEditPlusPipeline`; transformers' `Qwen2VLImageProcessorPil`, "
        "`get_rope_index`. diffusers does not tell transformers 5 which tokens are pictures; the tests do",
        "bit for bit",
        "tests/families/qwen_image/test_editing.py tests/families/qwen_image/test_vision.py",
    ),
    Row(
        "ERNIE-Image: text, guidance, image, mask × denoising strengths; schedules; bf16; token ids; files; LoRAs",
        "diffusers' `ErnieImagePipeline`, its converter of names, its `load_lora_weights`; a loop of the test over its "
        "scheduler and model for pictures and for the samplers that the pipeline does not take",
        "bit for bit; LoRAs within one step of 255",
        "tests/families/ernie_image/test_parity.py tests/families/ernie_image/test_files.py",
    ),
    Row(
        "Anima: text, guidance, image, mask × denoising strengths; schedules; samplers; bf16; token ids; files; LoRAs",
        "diffusers' `AnimaModularPipeline`, its converter of names, its `load_lora_weights`; a loop of the test over "
        "its scheduler and modules for masks and for the samplers that the pipeline does not take. The tests resize "
        "the mask of padding, for which diffusers needs torchvision",
        "bit for bit; diffusers' own sum of a LoRA within one step of 255",
        "tests/families/anima/test_parity.py tests/families/anima/test_files.py tests/families/anima/test_adapters.py",
    ),
    Row(
        "A checkpoint's own tokenizer: each family with T5 or Qwen",
        "the same model with Safelight's tokenizer, and the rows of its embeddings in the other order",
        "equal pixels",
        "tests/families/test_tokenizer_file.py::test_a_checkpoint_s_own_tokenizer_counts",
    ),
    Row(
        "Token ids",
        "transformers' CLIP tokenizer",
        "equal, for 300 random texts",
        "tests/request/prompts/test_tokens.py::test_ids_are_those_of_transformers",
    ),
)


def passed() -> list[tuple[str, str]]:
    """Run the tests of all rows; for each case (file::function, pytest's name). Raises SystemExit if one fails."""
    wanted = dict.fromkeys(test for row in ROWS for test in row.tests.split())
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *wanted, "-q", "-m", "not proof", "-n", "2", "--dist", "worksteal"]
        done = subprocess.run([*command, f"--junitxml={report}"], cwd=HOME, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout[-4000:])
        cases = list(ET.parse(report).iter("testcase"))
    if skipped := [case.attrib["name"] for case in cases if len(case)]:
        raise SystemExit(f"not run: {', '.join(skipped)}")
    places = [(case.attrib["classname"].replace(".", "/") + ".py", case.attrib["name"]) for case in cases]
    return sorted((f"{file}::{name.partition('[')[0]}", name) for file, name in places)


def cases(row: Row, every: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The row's cases among ``every``, by the words in the name of their test."""
    tests = row.tests.split()
    found: dict[str, list[str]] = {}
    for test, name in every:
        if test in tests or test.partition("::")[0] in tests:
            function, _, case = name.partition("[")
            words = _ROW.sub("", function).removeprefix("test_").replace("_", " ")
            found.setdefault(words, []).append(_readable(case.removesuffix("]")) if case else "")
    if not found:
        raise SystemExit(f"{row.what}: no test of {row.tests}")
    return found


def _readable(case: str) -> str:
    text = re.sub(r"\.safetensors|-?(expected|each)\d+$", "", case).replace("|", "\\|").replace("\n", " ")
    return text or "empty text"


def listed(each: Sequence[str]) -> str:
    """Return the cases of a test as text. A large matrix is a product of the values of its parameters."""
    columns = [list(dict.fromkeys(column)) for column in zip(*(case.split("-") for case in each), strict=False)]
    product = {"-".join(values) for values in itertools.product(*columns)}
    if len(each) >= LARGE and len(columns) > 1 and product == set(each):
        return " × ".join("(" + ", ".join(f"`{value}`" for value in values) + ")" for values in columns)
    return "; ".join(f"`{case}`" for case in each if case)


def main() -> None:
    lines = [
        "# Parity with other programs",
        "",
        "`python tools/parity.py docs/parity.md` runs the tests and writes this page. The tests use tiny random",
        "checkpoints, fp32 and one CPU thread. In each test, Safelight and the other program compute with the same",
        "weights, and the test compares the results. The sections below list all cases by the names of their tests.",
        "In the lists, a sign × means that every combination is a case; in the headings it only names what varies.",
        "",
        "| what | compared with | how exactly | cases (all are equal) |",
        "|---|---|---|---|",
    ]
    done = passed()
    every = [(row, cases(row, done)) for row in ROWS]
    counts = [sum(len(each) for each in found.values()) for _, found in every]
    for (row, _), count in zip(every, counts, strict=True):
        lines.append(f"| {row.what} | {row.other} | {row.exact} | {count} |")
    for row, found in every:
        lines += ["", f"## {row.what}", ""]
        for words, each in found.items():
            shown = listed(each)
            lines.append(f"- {words}: {shown}" if shown else f"- {words}")
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
    print(f"{sum(counts)} cases are equal")


if __name__ == "__main__":
    main()
