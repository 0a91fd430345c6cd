"""What is asked for: frozen, and checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from safelight.request.adapters import CONTROLS_HELP, MOST_CONTROLS, MOST_LORAS, Control, Embedding, Lora, parse_items
from safelight.request.assumed import AssumedValues
from safelight.request.bounds import LEAST_TILE, MOST_COUNT, MOST_HIRES, MOST_REFERENCES, MOST_SEED, MOST_SIDE
from safelight.request.field import FieldDeclaration, fields_of
from safelight.request.rules import check_together, read_outpaint, read_references
from safelight.request.run_settings import Precision
from safelight.request.samplers import MOST_STEPS, SAMPLERS, Schedule, describe_few_schedules
from safelight.request.values import UPSCALERS, PromptSyntax, Seamless

VERSION = 7
"""The version of stored requests, in pictures and in the queue. It goes up when a field is added, removed or renamed,
or when a default changes."""

PROMPTS, SAMPLING, SIZE, START, VARIATION = "Prompts and models", "Sampling", "Size", "From an image", "Variations"
HIRES, REFINER, RUN = "High-resolution fix", "Refiner", "How it runs"


@dataclass(frozen=True, slots=True)
class Request(AssumedValues):
    """What to draw: one prompt for one model; ``count`` images.

    Each field is declared here once. Its checks, the command line's option, the API's field and the documentation
    (docs/fields.md) follow from the declaration. ``loras``, ``controls`` and ``embeddings`` may be dicts, as JSON has
    them. Raises RequestError, naming the field, for a value that is not allowed.
    """

    prompt: Annotated[
        str, FieldDeclaration(help="What to draw.", label="Prompt", group=PROMPTS, a1111="prompt", openai="prompt")
    ]
    model: Annotated[
        str,
        FieldDeclaration(
            help="The name of a model in the library; on the command line also a path.",
            group=PROMPTS,
            a1111="override_settings.sd_model_checkpoint",
            openai="model",
        ),
    ]
    negative: Annotated[
        str,
        FieldDeclaration(
            help="What to keep out of the image.",
            label="Negative prompt",
            group=PROMPTS,
            a1111="negative_prompt",
            openai="negative_prompt",
        ),
    ] = ""
    seed: Annotated[
        int,
        FieldDeclaration(
            help="The first image's seed; each further image adds 1. By default, a random seed, which is recorded.",
            group=SAMPLING,
            minimum=0,
            maximum=MOST_SEED,
            a1111="seed",
            openai="seed",
        ),
    ] = 0
    steps: Annotated[
        int | None,
        FieldDeclaration(
            help="Sampling steps; by default the model's own number: 20 for Stable Diffusion.",
            group=SAMPLING,
            minimum=1,
            maximum=MOST_STEPS,
            a1111="steps",
            openai="steps",
            old_defaults={2: 20},
        ),
    ] = None
    width: Annotated[
        int | None,
        FieldDeclaration(
            help="Pixels, a multiple of 8; by default the model's own size, or the size of the input image.",
            group=SIZE,
            minimum=8,
            maximum=MOST_SIDE,
            multiple=8,
            a1111="width",
            openai="size",
        ),
    ] = None
    height: Annotated[
        int | None,
        FieldDeclaration(
            help="Pixels, a multiple of 8; width times height is at most 4096 times 4096.",
            group=SIZE,
            minimum=8,
            maximum=MOST_SIDE,
            multiple=8,
            a1111="height",
            openai="size",
        ),
    ] = None
    cfg: Annotated[
        float | None,
        FieldDeclaration(
            help="Scale of classifier-free guidance. 1 or less turns it off, and the negative prompt has no effect"
            " then. By default the model's own: 7 for Stable Diffusion.",
            label="Guidance",
            group=SAMPLING,
            minimum=0,
            maximum=100,
            a1111="cfg_scale",
            openai="cfg",
            old_defaults={2: 7.0},
        ),
    ] = None
    sampler: Annotated[
        str | None,
        FieldDeclaration(
            help="The sampler; AUTOMATIC1111's names also work: DPM++ 2M Karras. By default the model's own, or euler.",
            group=SAMPLING,
            values=SAMPLERS,
            a1111="sampler_name",
            openai="sampler",
            old_defaults={6: "euler"},
        ),
    ] = None
    schedule: Annotated[
        Schedule | None,
        FieldDeclaration(
            help=f"How the noise levels are spread over the steps. {describe_few_schedules()} By default the model's"
            " own, if the sampler is too, or default.",
            group=SAMPLING,
            a1111="scheduler",
            openai="schedule",
            old_defaults={6: "default"},
        ),
    ] = None
    count: Annotated[
        int,
        FieldDeclaration(
            help="Number of images.",
            label="Images",
            group=SAMPLING,
            minimum=1,
            maximum=MOST_COUNT,
            a1111="batch_size times n_iter",
            openai="n",
            option="--count -n",
        ),
    ] = 1
    clip_skip: Annotated[
        int | None,
        FieldDeclaration(
            help="Last layers of the text encoder to skip, as diffusers counts them; AUTOMATIC1111 counts one more. By"
            " default the model's own, or 0.",
            label="CLIP skip",
            group=PROMPTS,
            minimum=0,
            maximum=11,
            a1111="clip_skip",
            old_defaults={6: 0},
        ),
    ] = None
    precision: Annotated[
        Precision,
        FieldDeclaration(
            help="The dtype for computing: fp32, bf16, fp16 (each gives other pixels), or auto: fp32 on a CPU,"
            " elsewhere the best dtype of the device.",
            group=RUN,
        ),
    ] = "auto"
    isolate: Annotated[
        bool,
        FieldDeclaration(
            help="Make each image in a process that has never held another model. No pixel changes.", group=RUN
        ),
    ] = False
    loras: Annotated[
        tuple[Lora, ...],
        FieldDeclaration(
            help="LoRAs and related adapters; also `<lora:NAME:STRENGTH>` in a prompt. On the command line:"
            " NAME:STRENGTH (style:0.8), NAME:TEXT:UNET for two strengths (style:0.5:0.8), or"
            " style:te=0:unet=1:lbw=1,0,…; repeat for several.",
            maximum=MOST_LORAS,
            group=PROMPTS,
            option="--lora",
            a1111="prompt: <lora:…>",
        ),
    ] = ()
    lenient: Annotated[
        bool, FieldDeclaration(help="Ignore the tensors of an adapter that fit nothing in the model.", group=PROMPTS)
    ] = False
    vae: Annotated[
        str,
        FieldDeclaration(
            help="A VAE in place of the model's own: the name of a VAE or of a model; own: the model's own. By"
            " default the one that the model's defaults name, or the model's own.",
            group=PROMPTS,
            a1111="override_settings.sd_vae",
        ),
    ] = ""
    vae_digest: Annotated[
        str, FieldDeclaration(help="The digest that the VAE must have; empty for any.", group=PROMPTS, option=None)
    ] = ""
    image: Annotated[
        str,
        FieldDeclaration(
            help="The input image: a file on the command line; in the API, data:image/png;base64,… or the digest of a"
            " stored image.",
            group=START,
            a1111="init_images",
            openai="image",
        ),
    ] = ""
    mask: Annotated[
        str,
        FieldDeclaration(
            help="A picture in the same form as image. Its white part is drawn again, its black part stays.",
            group=START,
            a1111="mask",
            openai="mask",
        ),
    ] = ""
    strength: Annotated[
        float,
        FieldDeclaration(
            help="Denoising strength: the share of the steps to compute. At 1, little of the input image remains.",
            group=START,
            exclusive_minimum=0,
            maximum=1,
            needs=("image",),
            a1111="denoising_strength",
            openai="strength",
        ),
    ] = 0.75
    image_cfg: Annotated[
        float,
        FieldDeclaration(
            help="Image guidance scale: how strongly the result follows the input image. Only for instruct-pix2pix"
            " checkpoints.",
            label="Image guidance",
            group=START,
            minimum=1,
            maximum=100,
            needs=("image",),
            a1111="image_cfg_scale",
            since=2,
        ),
    ] = 1.5
    mask_blur: Annotated[
        int,
        FieldDeclaration(
            help="Width of the softened border of the mask, in pixels.",
            group=START,
            minimum=0,
            maximum=256,
            needs=("mask", "outpaint"),
            a1111="mask_blur",
        ),
    ] = 4
    mask_padding: Annotated[
        int | None,
        FieldDeclaration(
            help="Draw only the masked part, with this many pixels around it, at the full size.",
            group=START,
            minimum=0,
            maximum=4096,
            a1111="inpaint_full_res_padding",
        ),
    ] = None
    outpaint: Annotated[
        tuple[int, ...],
        FieldDeclaration(
            help="Make the image larger and draw the new parts: left,top,right,bottom, in pixels.",
            maximum=4,
            group=START,
        ),
    ] = ()
    references: Annotated[
        tuple[str, ...],
        FieldDeclaration(
            help="Pictures in the same form as image, for models that edit by reference; repeat for several.",
            label="Reference images",
            maximum=MOST_REFERENCES,
            group=START,
            option="--reference",
            openai="image[]",
            since=4,
        ),
    ] = ()
    controls: Annotated[
        tuple[Control, ...],
        FieldDeclaration(
            help=CONTROLS_HELP,
            maximum=MOST_CONTROLS,
            group=START,
            option="--control",
            a1111="alwayson_scripts.controlnet",
        ),
    ] = ()
    embeddings: Annotated[
        tuple[Embedding, ...] | None,
        FieldDeclaration(
            help="Textual inversions; by default, those whose names are in a prompt.",
            maximum=MOST_LORAS,
            group=PROMPTS,
            option=None,
        ),
    ] = None
    text_encoder: Annotated[
        str, FieldDeclaration(help="The name of another model, whose text encoders encode the prompts.", group=PROMPTS)
    ] = ""
    text_encoder_digest: Annotated[
        str, FieldDeclaration(help="The digest of those text encoders; empty for any.", group=PROMPTS, option=None)
    ] = ""
    prompt_syntax: Annotated[
        PromptSyntax,
        FieldDeclaration(
            help="The syntax of the prompts: AUTOMATIC1111's, or compel (InvokeAI's: word++, (words)1.3, .blend()).",
            group=PROMPTS,
        ),
    ] = "a1111"
    variation_seed: Annotated[
        int,
        FieldDeclaration(
            help="A second seed, whose noise is mixed in; each further image adds 1 to it.",
            group=VARIATION,
            minimum=0,
            maximum=MOST_SEED,
            needs=("variation_strength",),
            a1111="subseed",
        ),
    ] = 0
    variation_strength: Annotated[
        float,
        FieldDeclaration(
            help="The share of the second seed's noise. Above 0, all images of a request have the same seed.",
            group=VARIATION,
            minimum=0,
            maximum=1,
            a1111="subseed_strength",
        ),
    ] = 0.0
    hires_scale: Annotated[
        float,
        FieldDeclaration(
            help="Hires fix: draw, enlarge by this factor, and draw the result again; 1 turns it off.",
            group=HIRES,
            minimum=1,
            maximum=MOST_HIRES,
            a1111="hr_scale",
        ),
    ] = 1.0
    hires_upscaler: Annotated[
        str,
        FieldDeclaration(
            help="The method that enlarges the first image.",
            group=HIRES,
            values=tuple(UPSCALERS),
            needs=("hires_scale",),
            a1111="hr_upscaler",
        ),
    ] = "latent"
    hires_strength: Annotated[
        float,
        FieldDeclaration(
            help="Denoising strength of the second pass.",
            group=HIRES,
            exclusive_minimum=0,
            maximum=1,
            needs=("hires_scale",),
            a1111="denoising_strength",
        ),
    ] = 0.7
    hires_steps: Annotated[
        int,
        FieldDeclaration(
            help="Hires steps (0 = same as steps).",
            group=HIRES,
            minimum=0,
            maximum=MOST_STEPS,
            needs=("hires_scale",),
            a1111="hr_second_pass_steps",
        ),
    ] = 0
    tile: Annotated[
        int | None,
        FieldDeclaration(
            help="Size of the VAE's tiles in pixels, a multiple of 64; 0 turns tiling off. The default is 768 for"
            " images over 1536 times 1536 pixels that are not seamless, else 0.",
            group=RUN,
            minimum=0,
            maximum=MOST_SIDE,
            multiple=LEAST_TILE,
        ),
    ] = None
    refiner: Annotated[
        str,
        FieldDeclaration(
            help="A second model that computes the last steps, such as SDXL's refiner: the name of a model with the"
            " same latents. Adapters and ControlNets change only the first model.",
            group=REFINER,
            a1111="refiner_checkpoint",
            since=2,
        ),
    ] = ""
    refiner_digest: Annotated[
        str,
        FieldDeclaration(help="The digest of the refiner; empty for any.", group=REFINER, option=None, since=2),
    ] = ""
    refiner_start: Annotated[
        float,
        FieldDeclaration(
            help="The refiner starts at this share of the noise levels.",
            group=REFINER,
            exclusive_minimum=0,
            maximum=0.99,
            needs=("refiner",),
            a1111="refiner_switch_at",
            since=2,
        ),
    ] = 0.8
    seamless: Annotated[
        Seamless,
        FieldDeclaration(
            help="Axes along which the image repeats without a seam: x, y or xy.", group=SIZE, a1111="tiling"
        ),
    ] = ""
    guidance: Annotated[
        float | None,
        FieldDeclaration(
            help="Scale of distilled guidance, which some models read as an input. By default the model's own: 3.5 for"
            " FLUX.1 dev.",
            label="Distilled guidance",
            group=SAMPLING,
            minimum=0,
            maximum=100,
            a1111="distilled_cfg_scale",
            since=3,
        ),
    ] = None
    shift: Annotated[
        float | None,
        FieldDeclaration(
            help="Constant shift of a rectified flow's noise levels: above 1, more steps run at high noise. A model"
            " that stretches its levels to a last one does not do so then. By default the model's own.",
            label="Shift",
            group=SAMPLING,
            minimum=0.01,
            maximum=100,
            since=5,
        ),
    ] = None
    first_block_cache: Annotated[
        float,
        FieldDeclaration(
            help="Skip all blocks after the first if it changed less than this share. 0.1 is usual. The image differs.",
            group=SAMPLING,
            minimum=0,
            maximum=1,
            since=6,
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "loras", parse_items("loras", self.loras, Lora, MOST_LORAS))
        object.__setattr__(self, "controls", parse_items("controls", self.controls, Control, MOST_CONTROLS))
        if self.embeddings is not None:
            object.__setattr__(self, "embeddings", parse_items("embeddings", self.embeddings, Embedding, MOST_LORAS))
        for field in fields_of(Request).values():
            field.check(getattr(self, field.name))
        object.__setattr__(self, "outpaint", read_outpaint(self))
        object.__setattr__(self, "references", read_references(self))
        check_together(self)

    def for_image(self, index: int) -> Request:
        """Return the request for image ``index`` alone, counted from 0. Raises IndexError."""
        return self.for_images(index, 1)

    def for_images(self, first: int, count: int) -> Request:
        """Return the request for ``count`` images alone, from number ``first``, counted from 0. Raises IndexError.

        Only this place says how images of one request differ: by the variation seed if it has a strength, or the seed.
        """
        if not 0 <= first < first + count <= self.count:
            raise IndexError(f"images {first} to {first + count - 1} of {self.count}")
        if self.variation_strength:
            return replace(self, count=count, variation_seed=self.variation_seed + first)
        return replace(self, count=count, seed=self.seed + first)

    @property
    def first_pass_steps(self) -> int:
        """The number of steps that the first pass computes."""
        return min(self.step_count, int(self.step_count * self.strength)) if self.image else self.step_count

    @property
    def masked(self) -> bool:
        """Whether only a part of the image is drawn again."""
        return bool(self.mask or self.outpaint)
