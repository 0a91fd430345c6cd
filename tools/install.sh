#!/bin/sh
# Make .venv and install Safelight, its starters and what its tests need, pinned by constraints.txt.
#
# Variables of the environment:
#   PYTHON       the interpreter; default: the first of python3, python3.12, python3.13, python3.11 that fits
#   INSTALLER    uv or pip; default: uv if there is such a command and pip's configuration names no index
#   TORCH_INDEX  the index of PyTorch's CPU builds; empty: take PyTorch from the same index as all packages
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_CERT, UV_INDEX_URL, HTTPS_PROXY, …: those of pip and of uv.
#                uv also gets those of pip, and pip gets UV_INDEX_URL.
# docs/installing.md says how the sizes were measured.
set -eu

system=$(uname -s)
machine=$(uname -m)
if [ "$system" = Darwin ] && [ "$machine" = x86_64 ]; then
    echo "Intel Macs have no current PyTorch (its last release for them is 2.2), so Safelight cannot run here." >&2
    exit 2
fi

# uv does not read pip's configuration files: where they name an index, pip is used.
if [ -z "${INSTALLER:-}" ]; then
    INSTALLER=pip
    if command -v uv >/dev/null 2>&1; then
        python3 -m pip config list 2>/dev/null | grep -Eq '^[a-z]+\.(.*index|find-links)' || INSTALLER=uv
    fi
fi
case $INSTALLER in
uv | pip) ;;
*)
    echo "INSTALLER is '$INSTALLER'. Set it to uv or pip." >&2
    exit 2
    ;;
esac

# One index is enough for both programs. uv writes a list with commas, pip with spaces.
index=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-${PIP_INDEX_URL:-}}}
if [ "$INSTALLER" = pip ]; then
    index=${PIP_INDEX_URL:-$index}
    if [ -n "$index" ]; then export PIP_INDEX_URL="$index"; fi
else
    if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
    if [ -n "${PIP_EXTRA_INDEX_URL:-}" ] && [ -z "${UV_EXTRA_INDEX_URL:-}" ]; then
        export UV_EXTRA_INDEX_URL="$PIP_EXTRA_INDEX_URL" UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
    fi
    if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then
        UV_FIND_LINKS=$(printf %s "$PIP_FIND_LINKS" | tr -s ' ' ',')
        export UV_FIND_LINKS
    fi
    if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
fi

usable() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
    for python in "${PYTHON:-python3}" python3.12 python3.13 python3.11; do
        if usable "$python"; then
            # `safelight upgrade` uses pip, so uv also installs it (--seed).
            if [ "$INSTALLER" = uv ]; then
                uv venv --quiet --seed --python "$python" .venv
            else
                "$python" -m venv .venv
            fi
            break
        fi
    done
fi
if [ ! -x .venv/bin/python ] || ! usable .venv/bin/python; then
    echo "Python 3.11, 3.12 or 3.13 is needed, with its venv module (on Debian: python3-venv)." >&2
    exit 2
fi

install() {
    if [ "$INSTALLER" = uv ]; then
        uv pip install --quiet --python .venv/bin/python "$@"
    else
        .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"
    fi
}

torch=$(grep '^torch==' constraints.txt)
from=${index:-PyPI}

# A Linux machine without an NVIDIA GPU needs none of the gigabytes of CUDA that PyPI's build of PyTorch brings. A user
# who names an index gets everything from there.
if [ -z "${TORCH_INDEX+set}" ] && [ -z "$index" ]; then TORCH_INDEX=https://download.pytorch.org/whl/cpu; fi

if .venv/bin/python -c 'import torch' 2>/dev/null; then
    echo "PyTorch is already in .venv. $INSTALLER downloads the missing packages from $from: at most 340 MB."
elif [ "$system" != Linux ]; then
    echo "$INSTALLER downloads PyTorch and 130 more packages from $from: 390 MB."
elif [ -e /proc/driver/nvidia/version ]; then
    echo "This machine has an NVIDIA GPU. $INSTALLER downloads PyTorch with CUDA and 130 more packages from $from: 3.1 GB."
else
    refused=
    if [ -n "${TORCH_INDEX:-}" ]; then
        echo "$INSTALLER downloads 530 MB: PyTorch without CUDA from $TORCH_INDEX, and 130 more packages from $from."
        # Only one attempt, so that nobody waits long for an index that a firewall blocks.
        log=$(mktemp)
        if [ "$INSTALLER" = uv ]; then
            UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=15 install --no-deps --default-index "$TORCH_INDEX" "$torch" 2>"$log" || refused=yes
        else
            install --no-deps --retries 0 --timeout 15 --index-url "$TORCH_INDEX" "$torch" 2>"$log" || refused=yes
        fi
        if [ -n "$refused" ]; then
            tail -n 2 "$log" >&2
            echo "$TORCH_INDEX did not deliver $torch. $INSTALLER takes PyTorch from $from instead." >&2
        fi
        rm -f "$log"
    fi
    if [ -n "$refused" ] || [ -z "${TORCH_INDEX:-}" ]; then
        echo "$INSTALLER downloads 530 MB from $from, or 3.1 GB if the PyTorch there has CUDA (PyPI's has)."
    fi
fi

if ! install -c constraints.txt "$torch" -e '.[all,dev]' -e ./starter; then
    echo "$INSTALLER could not install Safelight from $from; the lines above say why. Behind a proxy, set HTTPS_PROXY;" >&2
    echo "for an index of your own, set PIP_INDEX_URL (docs/installing.md). The next 'make' continues." >&2
    exit 1
fi

# The page's tests need a browser: one that is there, the system's package where that may be installed, or playwright's.
browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if ! browser >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "apt-get downloads the browser Chromium for the tests of the page: 250 MB."
        if ! { apt-get update -qq && apt-get install -y -qq chromium >/dev/null; }; then
            echo "apt-get could not install Chromium; the lines above say why." >&2
        fi
    fi
    if ! browser >/dev/null 2>&1; then
        echo "playwright downloads the browser Chromium for the tests of the page, and prints its size."
        .venv/bin/playwright install chromium ||
            echo "There is no browser: 'make test' will fail at the page; 'make demo' does not need one." >&2
    fi
fi
