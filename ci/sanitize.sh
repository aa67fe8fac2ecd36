#!/bin/sh
# The op tests against an extension built with AddressSanitizer and UndefinedBehaviorSanitizer, in a build folder of its own.
# Arguments go to pytest.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
python=$root/.venv/bin/python
PATH=$root/.venv/bin:$PATH
export PATH
build=$root/build/sanitize
site=$build/site

cmake -S . -B "$build" -DPYATTR_SANITIZE=ON -DPYATTR_CUDA=off -DCMAKE_BUILD_TYPE=RelWithDebInfo "-DPython_EXECUTABLE=$python"
cmake --build "$build" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
# A copy of the package around it: the working tree's own extension stays as it is.
rm -rf "$site"
mkdir -p "$site"
cp -r pyattr "$site"
rm -f "$site"/pyattr/_C.*
cp "$build"/_C.*.so "$site/pyattr"
cp -r triton_kernels "$site/pyattr/triton_kernels"

# Python itself is not built with sanitizers, so their runtimes come first. libstdc++ comes along because the sanitizer looks
# for its exception functions when it starts.
compiler=${CXX:-c++}
runtimes=
for library in libasan.so libubsan.so libstdc++.so; do
  runtimes="$runtimes $("$compiler" -print-file-name=$library)"
done
cd "$site"
export LD_PRELOAD="$runtimes"
export ASAN_OPTIONS=detect_leaks=0  # Python and torch keep memory until the process ends
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$site"
export PYTHONDONTWRITEBYTECODE=1
"$python" -c "
import pyattr._C
assert pyattr._C.__file__.startswith('$site'), pyattr._C.__file__
with open('/proc/self/maps') as maps:
    assert 'libasan' in maps.read(), 'the sanitizer is not loaded'
"
# A read past the end of its input must end the process, or the tests below show nothing.
if "$python" -c "
import numpy as np
from pyattr.ops import rademacher_project
short = np.lib.stride_tricks.as_strided(np.ones(8, np.float32), (1, 100_000), (4, 4))
rademacher_project(short, 4, backend='cpu')
" 2> "$build/overflow.log"; then
  echo "ci/sanitize.sh: a read past the end of an array went unseen" >&2
  exit 1
fi
grep -q heap-buffer-overflow "$build/overflow.log"
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider "$root/tests/ops" "$@"
