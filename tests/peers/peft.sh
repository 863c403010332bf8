#!/usr/bin/env bash
# peft's own tests, for QWHA: bash tests/peers/peft.sh [pytest's arguments]
#
# Fetches the sdist of the peft that requirements.lock pins (from the index that pip is configured for), once, and runs
# its test files with the plug-in beside this script. Arguments that begin with "tests/" take the place of the list of
# files below. Exit status: pytest's; 3 where the sdist is neither in the cache nor to be had.
set -euo pipefail

version=0.21.2
sha256=b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e
files=(
  tests/test_custom_models.py tests/test_config.py tests/test_low_level_api.py tests/test_other.py
  tests/test_decoder_models.py tests/test_encoder_decoder_models.py tests/test_feature_extraction_models.py
  tests/test_seq_classifier.py tests/test_token_classification_qa.py
)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" > /dev/null || { echo "peft.sh: no $python; set PYTHON to an interpreter with hf_accel's dependencies" >&2; exit 2; }

installed=$("$python" -c 'import importlib.metadata; print(importlib.metadata.version("peft"))')
if [[ $installed != "$version" ]]; then
  echo "peft.sh: peft $installed is installed, this script is for $version: write the sdist's hash of $installed here" >&2
  exit 2
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/hf_accel/peers
home=$cache/peft-$version
if [[ ! -d $home ]]; then
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/.peft-XXXXXX")
  trap 'rm -rf "$work"' EXIT
  if ! "$python" -m pip download -q --no-deps --no-binary peft -d "$work" "peft==$version" > "$work/log" 2>&1; then
    echo "peft.sh: the sdist of peft $version is not in $home and cannot be had:" >&2
    tail -n 3 "$work/log" >&2
    exit 3
  fi
  if ! echo "$sha256  $work/peft-$version.tar.gz" | sha256sum --check --status; then
    echo "peft.sh: peft-$version.tar.gz is not the file of the pinned hash $sha256; nothing was unpacked" >&2
    exit 2
  fi
  tar -xzf "$work/peft-$version.tar.gz" -C "$work"
  touch "$work/peft-$version/tests/__init__.py"  # the sdist lacks it, and the files import one another
  # Another run may have been faster; its folder is the same.
  mv -T "$work/peft-$version" "$home" 2> /dev/null || [[ -d $home ]]
  rm -rf "$work"
  trap - EXIT
fi

for argument in "$@"; do
  if [[ $argument == tests/* ]]; then files=(); fi
done
cd "$home"
# peft's pyproject asks for pytest-cov.
PYTHONPATH=$root:$root/zoo/src:$here${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
  exec "$python" -m pytest -o addopts= -p no:cacheprovider -p peft_plugin -q -rsxXfE --tb=short --disable-warnings \
  "${files[@]}" "$@"
