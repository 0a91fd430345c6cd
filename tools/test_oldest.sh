#!/bin/sh
# Run the core of the tests with the oldest versions that pyproject.toml allows, in .venv-oldest.
#
# Variables of the environment:
#   PYTHON         the interpreter; default: python3.11, else python3
#   TORCH_VERSION  another version of PyTorch; default: the one of constraints-oldest.txt
#   TORCH_INDEX    the index of PyTorch's CPU builds; empty: take PyTorch from the same index as all packages
#   PIP_INDEX_URL, PIP_FIND_LINKS, HTTPS_PROXY, …: those of pip
set -eu

# Other packages than those of .venv-oldest must not be found.
unset PYTHONPATH

oldest=$(sed -n 's/^torch==//p' constraints-oldest.txt)
version=${TORCH_VERSION:-$oldest}
python=.venv-oldest/bin/python

if [ ! -x "$python" ]; then
    interpreter=${PYTHON:-$(command -v python3.11 || command -v python3)}
    "$interpreter" -m venv .venv-oldest
fi
install() { "$python" -m pip --disable-pip-version-check install --quiet "$@"; }

constraints=.venv-oldest/constraints.txt
sed "s/^torch==.*/torch==$version/" constraints-oldest.txt >"$constraints"

# As in install.sh: a machine without an NVIDIA GPU needs no CUDA.
if [ -z "${TORCH_INDEX+set}" ] && [ -z "${PIP_INDEX_URL:-}" ] && [ "$(uname -s)" = Linux ] &&
    [ ! -e /proc/driver/nvidia/version ]; then
    TORCH_INDEX=https://download.pytorch.org/whl/cpu
fi
if [ -n "${TORCH_INDEX:-}" ] && ! "$python" -c "import torch; assert torch.__version__.split('+')[0] == '$version'" 2>/dev/null; then
    install --no-deps --retries 0 --timeout 15 --index-url "$TORCH_INDEX" "torch==$version" 2>/dev/null ||
        echo "$TORCH_INDEX did not deliver torch $version. pip takes it from the same index as all packages." >&2
fi
# Without the extra mcp, whose package needs a newer pydantic.
install -c "$constraints" -e '.[server,compiled,preprocess,samplers]'
# The tools for the tests need not be old.
install -c "$constraints" --no-deps -e ./starter
install -c "$constraints" pytest pytest-xdist hypothesis gguf sd-parsers

"$python" - <<'END'
from importlib.metadata import version

names = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "pillow", "pydantic")
print("oldest versions:", ", ".join(f"{name} {version(name)}" for name in names))
END

# What is left out compares with compel, peft or lycoris, whose versions for these diffusers and transformers differ, or
# is slow and does not depend on the versions of packages.
"$python" -m pytest --disable-plugin-autoload -p xdist -p _hypothesis_pytestplugin -n 2 --dist worksteal \
    -m "not proof and not full" --no-header -q \
    tests/families tests/models tests/weights tests/files tests/memory tests/pipeline tests/adapters tests/request \
    tests/catalog tests/pictures tests/boundary tests/queue tests/test_settings.py tests/test_errors.py \
    tests/test_extras.py \
    --ignore tests/families/test_compel_weighting.py --ignore tests/weights/test_adapter_formulas.py \
    --ignore tests/pipeline/test_prompts.py --ignore tests/request/prompts/test_compel_grammar.py \
    --ignore tests/request/prompts/test_choices_as_dynamicprompts.py \
    --ignore tests/adapters/test_parity.py --ignore tests/files/test_safetensors.py
