#!/usr/bin/env bash
# Submit a run to a running Ray cluster and follow it: cluster/submit.sh conf/demo.yaml [key=value ...] [--no-wait] [--working-dir .]
#
#   RAY_API_SERVER_ADDRESS  the cluster's dashboard (default http://127.0.0.1:8265)
#   SPIN_PYTHON             interpreter that has spin_ray, at the same path here and on the cluster (default: this checkout's .venv)
#
#   --no-wait               print the job's id and return
#   --working-dir FOLDER    ship this checkout, for a cluster that has only what it depends on; SPIN_PYTHON is the cluster's (python)
#   --secret NAME=FILE      give the driver what a file on the cluster holds; --help has all options
#
# Run directories go to ./runs unless run.dir=... is given; on several nodes it must be a path that all of them see, or a URL (s3://).
# The exit code is the job's: 0 finished, 2 bad input, 1 failed, 130 stopped. Submit again to go on where a run stopped.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
python=$root/.venv/bin/python
case " $* " in *" --working-dir"*) ;; *) python=${SPIN_PYTHON:-$python} ;; esac
[ -x "$python" ] || { echo "submit.sh: $python is not there; run make setup, or set SPIN_PYTHON" >&2; exit 2; }
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}  # the default of `ray start --head`
exec "$python" -m spin_ray.submit "$@"
