"""The components of a family: the settings of their architectures, and where files have them.

No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from safelight.families.tables import Shapes, TensorRow, TensorSource
from safelight.families.tokenizer_file import TokenizerFile
from safelight.request.adapters import Purpose


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one component's architecture. Subclasses are frozen dataclasses whose fields are JSON values."""

    architecture: ClassVar[str] = ""
    """Its name in records."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Build the settings from what a record holds. Raises TypeError for values of another architecture."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def rows(self) -> Iterable[TensorRow]:
        """Return the table of all tensors, in the order in which a forward pass uses them."""
        return ()

    @property
    def published(self) -> Config:
        """The settings of the whole component, with the layers at its end that the family does not read."""
        return self

    def unread_rows(self) -> Iterable[TensorRow]:
        """Return the table of the tensors of :attr:`published` that the family does not read."""
        return ()

    @property
    def label(self) -> str:
        """A short text that differs between sizes, such as ``320-640x2``."""
        return ""

    def keeps_fp32(self, name: str) -> bool:
        """Return whether the library needs a tensor in fp32, whatever dtype the component computes in.

        ``name``: in the module.
        """
        del name
        return False

    def working_bytes(self, pixels: int, itemsize: int, quadratic: bool) -> int:
        """Estimate the bytes of activations in one forward pass.

        ``pixels``: of the image.
        ``itemsize``: bytes of an element.
        ``quadratic``: the attention kernel stores all scores.
        """
        raise NotImplementedError(type(self).__name__)

    @property
    def hidden_size(self) -> int:
        """Width of a text encoder's hidden states and token embeddings; 0 for other components."""
        return 0

    @property
    def encoder_layers(self) -> int:
        """Layers of a text encoder; 0 for other components."""
        return 0

    def text_bytes(self, tokens: int, itemsize: int) -> int:
        """Estimate the bytes of activations in one forward pass of a text encoder.

        ``tokens``: how many it reads.
        ``itemsize``: bytes of an element.
        """
        del tokens, itemsize
        return 0

    @property
    def reads_latents(self) -> bool:
        """Whether a ControlNet reads the latents of its picture instead of the pixels; False for other components."""
        return False

    @property
    def union_types(self) -> tuple[str, ...]:
        """The types of pictures that a union of ControlNets tells apart; () for other components."""
        return ()

    @property
    def depends_on_size(self) -> bool:
        """Whether a forward pass takes more memory for a larger image."""
        return True


@dataclass(frozen=True, slots=True)
class Component:
    """A component of a family.

    ``role``: its name in records.
    ``prefixes``: prefixes of its tensors in a single file; the first one that a file has counts.
    ``infer``: infers the settings from shapes. Raises NotThisArchitecture, or KeyError for a tensor that is missing.
    ``standard``: the published settings. They name the missing tensors of a file whose settings cannot be inferred.
    ``lora_prefixes``: prefixes of its modules in files of adapters that write ``_`` for ``.`` (kohya's scripts).
    ``lora_paths``: prefixes of its modules in files of adapters that keep the dots (ComfyUI).
    ``optional_prefix``: a prefix that names of its modules may have or lack.
    ``adapter_sources``: returns further names of a tensor, by its name in the module, that only adapters use.
    ``block_of``: names the block that contains a module, from the module's names in files; for block weights.
    ``is_unread``: says whether the family never reads a tensor, by its name in the module. None if it reads all.
    ``overflows_in_fp16``: it computes in fp32 where the others compute in fp16.
    ``tokenizer``: of a text encoder; None for others.
    ``most_tokens``: how many tokens of a prompt a text encoder reads; the rest is cut off. 0 if it reads all.
    ``most_tokens_of``: the same for some variants.
    ``variants``: the variants whose checkpoints have it; empty for all.
    ``within``: the role of the component whose folder and files also have this one's tensors; "" for files of its own.
    ``found_in``: which files have it, for the error of a checkpoint without it; "" if its role says that.
    ``reads``: the role of the text encoder whose output for a text this one reads with the text; "" for none.
    """

    role: str
    purpose: Purpose
    prefixes: tuple[str, ...]
    infer: Callable[[Shapes], Config]
    standard: Config | None = None
    lora_prefixes: tuple[str, ...] = ()
    lora_paths: tuple[str, ...] = ()
    optional_prefix: str = ""
    adapter_sources: Callable[[str], Iterable[TensorSource]] = lambda _: ()
    block_of: Callable[[Iterable[str]], str] | None = None
    is_unread: Callable[[str], bool] | None = None
    overflows_in_fp16: bool = False
    tokenizer: TokenizerFile | None = None
    most_tokens: int = 0
    most_tokens_of: Mapping[str, int] = field(default_factory=dict[str, int])
    variants: frozenset[str] = frozenset()
    within: str = ""
    found_in: str = ""
    reads: str = ""

    @property
    def folder(self) -> str:
        """Its folder in a diffusers folder."""
        return self.within or self.role


@dataclass(frozen=True, slots=True)
class SingleFileComponent:
    """A component in a file without the others: in a file of its own, or beside the component that it is ``within``.

    ``kind``: the kind of such files.
    ``prefix``: what names may begin with.
    ``what``: its name in messages.
    ``pattern``: matches the start of some tensor's name; "" if the kind alone decides.
    ``absent``: matches the start of no tensor's name; "" if any name may be there.
    ``left_over``: says why a file may have a tensor that no module needs; None for the family's function.
    ``role``: of the family's component that it is; "" for the one named ``kind``.
    """

    kind: str
    prefix: str
    what: str
    infer: Callable[[Shapes], Config]
    pattern: str = ""
    left_over: Callable[[str], str | None] | None = None
    absent: str = ""
    role: str = ""

    def fits(self, names: Collection[str]) -> bool:
        """Return whether a file whose tensors have these names may be this component."""
        present = any(re.match(self.pattern, name) for name in names)
        return present and not (self.absent and any(re.match(self.absent, name) for name in names))
