"""The one place that imports diffusers and transformers: a module for each thing that is asked of them.

Both are pinned exactly; what is relied on here has a contract test in ``tests/arch/test_diffusers_fence.py``:
skeletons built on meta have no real parameter and no persistent buffer; the attention processor that is set is the one
that is called; pipelines take embeddings and give latents without a text encoder or VAE.
"""

import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager

_HUB = "HF_HUB_OFFLINE"
_before = os.environ.get(_HUB)
os.environ.setdefault(_HUB, "1")
"""Nothing is ever fetched to build or read a model. The libraries look when they are imported; afterwards the
environment is the host's again."""


@contextmanager
def hushed() -> Generator[None]:
    """Within, the libraries say errors only, whatever the host has set; after it as before.

    What they warn of (an absent torchvision, modules that could be kept in fp32) does not concern what is asked here.
    """
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


with hushed():
    import diffusers
    import transformers

if _before is None:
    del os.environ[_HUB]


def quiet() -> None:
    """Have the libraries say errors only: for processes of our own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()


TRANSFORMERS: str = transformers.__version__
VERSION: str = diffusers.__version__
