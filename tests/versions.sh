#!/usr/bin/env bash
# Runs the quick tests with each version of torch and of Python that is promised, in an environment of its own.
#
#     tests/versions.sh                 every pair below
#     tests/versions.sh 2.14.0/3.13     this pair: torch 2.14.0, Python 3.13
#
# Run it by hand: on Linux pip installs torch's CUDA build, 5 GB and 20 minutes a pair. With
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu it may take the small CPU build. An environment is
# removed after its tests. The last lines say what each pair gave, and a pair that fails fails the script.
set -uo pipefail
cd "$(dirname "$0")/.."
pairs=("$@")
((${#pairs[@]})) || pairs=(2.11.0/3.11 2.11.0/3.12 2.13.0/3.11 2.13.0/3.12 2.13.0/3.13 2.14.0/3.12 2.14.0/3.13)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

try() {  # torch's version, Python's version
    python=python$2  # pyenv's command of this name may be there, and find no version
    "$python" --version &>/dev/null ||
        python=$(ls "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$2".*/bin/python 2>/dev/null | tail -1)
    [ -n "$python" ] || { outcome="no Python $2 is found"; return 1; }
    "$python" -m venv "$folder/env" &&
        "$folder/env/bin/pip" install -q -r requirements-dev.txt "torch==$1" ||
        { outcome="not installed"; return 1; }
    "$folder/env/bin/python" -m pytest -m "not slow" -p no:cacheprovider | tee "$folder/tests"
    result=${PIPESTATUS[0]}
    outcome=$(tail -1 "$folder/tests")
    return "$result"
}

for pair in "${pairs[@]}"; do
    echo "+ torch ${pair%/*}, Python ${pair#*/}"
    try "${pair%/*}" "${pair#*/}" || failed=1
    echo "torch ${pair%/*}, Python ${pair#*/}: $outcome" >> "$folder/outcomes"
    rm -rf "$folder/env"
done
cat "$folder/outcomes"
exit $failed
