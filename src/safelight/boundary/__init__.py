"""The only package that imports diffusers and transformers, with a module for each use of them.

Both are pinned to exact versions. ``tests/boundary/test_modules.py`` tests what Safelight relies on: skeletons
built on meta have no real parameter and no persistent buffer; modules call the attention processor that was set;
pipelines take embeddings and return latents without a text encoder or VAE.
"""

import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module

_HUB = "HF_HUB_OFFLINE"
_before = os.environ.get(_HUB)
os.environ.setdefault(_HUB, "1")
"""No file is ever downloaded to build or read a model. The libraries read the variable when they are imported. After
that, the host's environment is restored."""


@contextmanager
def hushed() -> Generator[None]:
    """Let the libraries log errors only within the context, and restore the host's log levels afterwards.

    Their warnings (missing torchvision, modules that could stay in fp32) do not matter for Safelight's use of them.
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

    # `import transformers` makes pyright read all of its models, a quarter of the time of the type check.
    transformers = import_module("transformers")

if _before is None:
    del os.environ[_HUB]


def quiet() -> None:
    """Let the libraries log errors only. Call it only in Safelight's own processes."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()


TRANSFORMERS: str = transformers.__version__
VERSION: str = diffusers.__version__
