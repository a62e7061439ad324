#!/usr/bin/env bash
# Prints the path of the interpreter that the environments are made with: PYTHON if it is given, else the first of python3.12, python3.13,
# python3 and pyenv's versions that really runs and is 3.12 or newer, else one that is 3.11. A name on PATH proves nothing: pyenv puts
# shims there that fail unless their version is selected.
set -u

# Path and version (312) of an interpreter that runs and can make environments, or nothing.
probe() {
    "$1" -c 'import ensurepip, sys, venv; print(sys.executable, sys.version_info[0] * 100 + sys.version_info[1])' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    candidates=("$PYTHON")
else
    candidates=(python3.12 python3.13 python3)
    root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}
    for version in 3.12 3.13 3.11; do
        candidates+=("$root"/versions/"$version"*/bin/python3)
    done
    candidates+=(python3.11)
fi

old=
for candidate in "${candidates[@]}"; do
    read -r path version < <(probe "$candidate") || continue
    if [ "$version" -ge 312 ]; then
        echo "$path"
        exit 0
    fi
    [ "$version" -eq 311 ] && old=${old:-$path}
done

if [ -n "$old" ]; then
    echo "Python 3.11 ($old): megatron-core 0.16.1, the last release for it; with Python 3.12 or newer it is 0.19.2" >&2
    echo "$old"
    exit 0
fi
echo "no usable Python: need 3.12 or newer (or 3.11, with megatron-core 0.16.1) that runs and has venv; tried ${candidates[*]};" \
    "install one (Debian: python3 and python3-venv) or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
