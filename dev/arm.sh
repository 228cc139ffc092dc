#!/usr/bin/env bash
# Test on 64-bit Arm, emulated by QEMU: make test-arm. Debian's packages and the wheels for Arm are unpacked into
# build/arm (0.7 GB): this installs nothing and needs no root. The first run compiles for minutes; kernels are kept.
#
#   dev/arm.sh            kernels, decoding, golden runs, selftest, a run and its resume
#   dev/arm.sh ARGS …     Python with these arguments, on Arm
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/build/arm/root cache=$PWD/build/arm/cache host=${PYTHON:-.venv/bin/python}

skip() {
    echo "test-arm skipped: $1"
    exit 0
}

# apt-get in folders of its own, for packages of one architecture; dependencies included, as none is installed.
fetch() {
    local arch=$1 apt=$root/apt-$1
    shift
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    : > "$apt/status"
    local options=(
        -qq -o APT::Architecture="$arch" -o APT::Architectures="$arch" -o APT::Sandbox::User= -o Debug::NoLocking=1
        -o Dir::State="$apt" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache"
        -o APT::Install-Recommends=0
    )
    apt-get "${options[@]}" update > "$apt/log" 2>&1 &&
        apt-get "${options[@]}" install --download-only --yes "$@" >> "$apt/log" 2>&1
}

install() {
    [ "$(uname -s)" = Linux ] || skip "this is not Linux"
    command -v apt-get > /dev/null || skip "this needs apt-get (Debian, Ubuntu)"
    echo "unpacking Python for Arm into build/arm (once)"
    rm -rf "$root"
    mkdir -p "$root/usr/lib" "$root/qemu"
    ln -s usr/lib "$root/lib"
    fetch "$(dpkg --print-architecture)" qemu-user-static ||
        skip "no QEMU: $(tail -1 "$root/apt-$(dpkg --print-architecture)/log")"
    fetch arm64 python3 libstdc++6 || skip "no packages for Arm: $(tail -1 "$root/apt-arm64/log")"
    dpkg-deb -x "$root"/apt-*/cache/archives/qemu-user-static_*.deb "$root/qemu"
    for package in "$root"/apt-arm64/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
    rm -rf "$root"/apt-*/lists "$root"/apt-*/cache

    local python version
    python=$(cd "$root/usr/bin" && ls -d python3.?? | head -1)
    version=${python#python}
    "$host" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"],
        "pytest>=8", "hypothesis>=6.100", sep="\n")' > "$root/requirements.txt"
    "$host" -m pip install --quiet --quiet --disable-pip-version-check --only-binary=:all: \
        --python-version "$version" --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
        --target "$root/usr/lib/python3/dist-packages" -r "$root/requirements.txt" || skip "no wheels for Arm"
    # Processes that Python starts are emulated as well: the kernel of this system cannot run the binary itself.
    printf '#!/bin/sh\nexec %s -L %s %s "$@"\n' "$root/qemu/usr/bin/qemu-aarch64-static" \
        "$root" "$root/usr/bin/$python" > "$root/python"
    chmod +x "$root/python"
    rm -f "$root/usr/lib/$python/sitecustomize.py"
    echo "import sys; sys.executable = '$root/python'" > "$root/usr/lib/$python/sitecustomize.py"
    touch "$root/.installed"
}

[ "$root/.installed" -nt pyproject.toml ] || install
export LLMPY_CACHE_DIR=$cache PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1
unset NUMBA_CPU_NAME NUMBA_CPU_FEATURES
if [ $# -gt 0 ]; then exec "$root/python" "$@"; fi

run=$(mktemp -d) llmpy=("$root/python" -m llmpy)
trap 'rm -rf "$run"' EXIT
"$root/python" -m pytest -p no:cacheprovider tests/backend/test_{exp,ops,decode,int8}.py \
    tests/generate/test_kv_cache.py tests/train/test_golden.py
"${llmpy[@]}" selftest
train=(train --data tests/fixtures/0.1.0/text.txt --model d1 --vocab-size 300 -B 2 -T 32 --schedule constant --checkpoint-every 3)
"${llmpy[@]}" "${train[@]}" --steps 6 --out "$run/whole"
"${llmpy[@]}" "${train[@]}" --steps 3 --out "$run/resumed"
"${llmpy[@]}" train --resume "$run/resumed" --steps 6
cmp "$run"/{whole,resumed}/model.safetensors && echo "a resumed run has the bits of an uninterrupted one"
