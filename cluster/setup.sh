#!/usr/bin/env bash
# Make .venv in the project's root and install spin_ray into it. PROFILE=cpu|gpu; PYTHON is the interpreter to use.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet "$@"; }

if [ "${PROFILE:-cpu}" = gpu ]; then
  pip install -e ".[gpu,dev]"
  exit
fi

# torch first and alone: asked for through another package, pip would take the newest CUDA build, gigabytes of it.
.venv/bin/python -c 'import torch; assert torch.__version__.startswith("2.13.0")' 2>/dev/null ||
  pip install "torch==2.13.0+cpu" 2>/dev/null ||
  pip install "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
pip install -e ".[cpu,dev]"
# The first three come in built for CUDA and then break `import transformers`; SPIN needs text only. Nothing here runs Triton on a
# CPU, but torch.compile's front end imports it wherever it is found: 66 MiB in every process.
pip uninstall --yes torchvision torchaudio torchcodec triton
