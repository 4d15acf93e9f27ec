#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install the CPU build of torch into the environment of the given Python; never a CUDA build.
#   tools/install_torch.sh PYTHON VERSION        e.g. tools/install_torch.sh .venv/bin/python 2.13.0
set -euo pipefail
python=$1
wanted="$2+cpu"

installed() { "$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true; }

if [ "$(installed)" != "$wanted" ]; then
    # The local version +cpu exists in CPU builds only, so no source can answer with a CUDA build. pip's own sources come first: a
    # mirror or a folder of wheels may have it. PyTorch's index is asked with --no-deps: it mirrors other packages too.
    "$python" -m pip install -q --no-deps "torch==$wanted" 2>/dev/null ||
        "$python" -m pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$wanted"
fi
# The metadata is not the library: ask the library itself.
"$python" - <<'EOF'
import sys
import torch
if torch.version.cuda is not None:
    sys.exit(f"torch {torch.__version__} is a CUDA build")
print("torch", torch.__version__)
EOF
