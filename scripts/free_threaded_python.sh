#!/bin/sh
# Print the path of a free-threaded Python (3.13 or newer): PYTHON if that is one, one that is
# installed, the one that this built before, or else one that it builds from the source package of
# Debian, which takes some five minutes. Works on Debian and its kin; elsewhere install one.
set -eu

is_free_threaded() {
    "$1" -c 'import sys, sysconfig
sys.exit(not sysconfig.get_config_var("Py_GIL_DISABLED") or sys.version_info < (3, 13))' 2>/dev/null
}

place=$PWD/build/python-freethreaded
for python in "${PYTHON:-}" python3.15t python3.14t python3.13t \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[3-9]*t/bin/python3 "$place/bin/python3"; do
    if [ -n "$python" ] && is_free_threaded "$python"; then
        command -v "$python"
        exit
    fi
done

say() { echo "free_threaded_python.sh: $*" >&2; }
if ! command -v apt-get >/dev/null; then
    say "no free-threaded Python found, and no apt-get to build one from: name one by PYTHON="
    exit 1
fi
as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
needed='gcc make xz-utils libssl-dev zlib1g-dev libffi-dev libbz2-dev liblzma-dev libsqlite3-dev'
# shellcheck disable=SC2086 # words
if ! dpkg -s $needed >/dev/null 2>&1; then
    say "installing $needed"
    $as_root apt-get update -qq >&2
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $needed >&2
fi

trap '[ $? = 0 ] || say "failed; see the logs in $work"' EXIT
# Lists of our own, from the mirror that this machine uses: its sources are left alone.
work=$PWD/build/source-python
rm -rf "$work"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -n 1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb-src [signed-by=$keys] $mirror trixie main" >"$work/sources.list"
cd "$work"
with_own_lists() {
    command=$1
    shift
    apt-get -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" \
        -o APT::Sandbox::User=root -qq "$command" "$@" >>"$work/apt.log" 2>&1
}
say "fetching the source package python3.13"
with_own_lists update
with_own_lists source --download-only python3.13
# As it was before Debian's changes, some of which are of where packages lie.
mkdir python
tar -xf python3.13_*.orig.tar.xz --strip-components 1 -C python
cd python
say "building it into $place"
./configure -q --prefix="$place" --disable-gil --without-ensurepip >"$work/configure.log" 2>&1
make -s -j"$(nproc)" >"$work/make.log" 2>&1
make -s install >"$work/install.log" 2>&1
cd "$place/.."
rm -rf "$work"
is_free_threaded "$place/bin/python3"
echo "$place/bin/python3"
