#!/usr/bin/env bash
# Make .venv in the project's root and install spin_ray into it. PROFILE=cpu|gpu; PYTHON is the interpreter to use.
# What pip says goes to .venv/setup.log; its end is shown if something fails. Run again to go on after a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
  fail "$python does not run; install Python 3.11 or 3.12, or name one: make setup PYTHON=python3.12"
case $version in
  3.11 | 3.12) ;;
  *) fail "$python is Python $version; spin_ray needs 3.11 or 3.12: make setup PYTHON=python3.12" ;;
esac

# What an interrupted setup has left: a .venv whose Python or pip does not run, or one of another Python's.
if [ -e .venv ] || [ -L .venv ]; then
  if ! has=$(.venv/bin/python -c 'import sys, pip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    say ".venv is only half there: making it anew"
    rm -rf .venv
  elif [ "$has" != 3.11 ] && [ "$has" != 3.12 ]; then
    fail ".venv has Python $has; spin_ray needs 3.11 or 3.12: delete .venv, then make setup again"
  fi
fi
if [ ! -e .venv ]; then
  made=$("$python" -m venv .venv 2>&1) || {
    rm -rf .venv
    fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt install python$version-venv): $(echo "$made" | tail -n 1)"
  }
fi

log=.venv/setup.log
: > "$log"
finished=
at_end() {
  code=$?
  [ -n "$finished" ] && return
  say "not finished (exit code $code); the end of $log:"
  grep -v '^WARNING' "$log" | tail -n 15 >&2 || true
  say "the same command goes on where this one stopped"
}
trap at_end EXIT
trap 'exit 130' INT TERM
say "installing into .venv, which takes some minutes; log: $log"

pip() { .venv/bin/python -m pip --disable-pip-version-check --no-input "$@" >> "$log" 2>&1; }

if [ "${PROFILE:-cpu}" = gpu ]; then
  pip install -e ".[gpu,dev,eval]"
else
  # torch first and alone: asked for through another package, pip would take the newest CUDA build, gigabytes of it.
  .venv/bin/python -c 'import torch; assert torch.__version__.startswith("2.13.0")' >> "$log" 2>&1 ||
    pip install "torch==2.13.0+cpu" ||
    pip install "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
  pip install -e ".[cpu,dev,eval]"
  # The first three come in built for CUDA and then break `import transformers`; SPIN needs text only. Nothing here runs Triton on
  # a CPU, but torch.compile's front end imports it wherever it is found: 66 MiB in every process.
  pip uninstall --yes torchvision torchaudio torchcodec triton
fi
finished=yes
say "done in $SECONDS s"
