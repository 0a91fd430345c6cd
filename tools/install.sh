#!/bin/sh
# Make .venv and install Safelight, its starters and what its tests need, pinned by constraints.txt.
set -eu

system=$(uname -s)
machine=$(uname -m)
if [ "$system" = Darwin ] && [ "$machine" = x86_64 ]; then
    echo "Intel Macs have no current PyTorch (its last release for them is 2.2), so Safelight cannot run here." >&2
    exit 2
fi

usable() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
    for python in "${PYTHON:-python3}" python3.12 python3.13 python3.11; do
        if usable "$python"; then
            "$python" -m venv .venv
            break
        fi
    done
fi
if [ ! -x .venv/bin/python ] || ! usable .venv/bin/python; then
    echo "Python 3.11, 3.12 or 3.13 is needed, with its venv module (on Debian: python3-venv)." >&2
    exit 2
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
torch=$(grep '^torch==' constraints.txt)

# A Linux machine without an NVIDIA GPU needs none of the gigabytes of CUDA that the default build brings.
if [ "$system" = Linux ] && [ ! -e /proc/driver/nvidia/version ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    pip install --quiet --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "$torch" 2>/dev/null ||
        echo "PyTorch's CPU index cannot be reached; taking the pinned release from the default index."
fi
pip install --quiet -c constraints.txt "$torch"
pip install --quiet -c constraints.txt -e '.[dev]' -e ./starter

# The page's tests need a browser: one that is there, the system's package where that may be installed, or playwright's.
browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if ! browser >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        apt-get update -qq && apt-get install -y -qq chromium >/dev/null
    fi
    browser >/dev/null 2>&1 || .venv/bin/playwright install chromium ||
        echo "No browser could be had: 'make test' will fail at the page; 'make demo' does not need one." >&2
fi
