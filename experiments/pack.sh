#!/bin/bash
# pack.sh FOLDER: what the experiment needs, without the parts of the package that look for versions and data sets.
set -e
here="$(cd "$(dirname "$0")/.." && pwd)"
rm -rf "$1/hf_so2"; mkdir -p "$1"
(cd "$here" && find hf_so2 -name '*.py' | tar cf - -T -) | tar xf - -C "$1"
echo '"""A copy for an experiment."""' >"$1/hf_so2/__init__.py"
cp "$here"/experiments/width_drift*.py "$1/"
cp "$here/experiments/device_run.sh" "$1/run.sh"
