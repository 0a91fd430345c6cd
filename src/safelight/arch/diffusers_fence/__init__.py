"""The one place that imports diffusers and transformers: a module for each thing that is asked of them.

Both are pinned exactly; what is relied on here has a contract test in ``tests/arch/test_diffusers_fence.py``:
skeletons built on meta have no real parameter and no persistent buffer; the attention processor that is set is the one
that is called; pipelines take embeddings and give latents without a text encoder or VAE.
"""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
"""Nothing is ever fetched to build or read a model. Set before the libraries look."""

import diffusers  # noqa: E402 - it looks at the environment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

diffusers_logging.set_verbosity_error()
transformers_logging.set_verbosity_error()
"""transformers says that torchvision is missing when pipelines are imported; nothing here needs it."""

VERSION: str = diffusers.__version__
