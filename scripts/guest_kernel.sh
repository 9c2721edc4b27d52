#!/bin/sh
# Print the path of a kernel image for `make numa-guest`: KERNEL if that is given, one of this
# machine, or else Debian's for clouds, downloaded and unpacked under build. Installs the emulator
# too, if it is missing. Works on Debian and its kin; elsewhere name a kernel by KERNEL=.
set -eu

say() { echo "guest_kernel.sh: $*" >&2; }
if [ -n "${KERNEL:-}" ] && ! [ -r "$KERNEL" ]; then
    say "KERNEL: $KERNEL cannot be read"
    exit 1
fi
as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
if ! command -v qemu-system-x86_64 >/dev/null; then
    if ! command -v apt-get >/dev/null; then
        say "install qemu-system-x86_64"
        exit 1
    fi
    say "installing qemu-system-x86"
    $as_root apt-get update -qq >&2
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends qemu-system-x86 >&2
fi

place=$PWD/build/guest-kernel
for kernel in "${KERNEL:-}" /boot/vmlinuz-* "$place"/boot/vmlinuz-*; do
    if [ -n "$kernel" ] && [ -r "$kernel" ]; then
        echo "$kernel"
        exit
    fi
done
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p' | head -n 1)
say "downloading ${package:?the lists of packages are empty: run apt-get update}"
mkdir -p "$place"
cd "$place"
apt-get -o APT::Sandbox::User=root download -qq "$package" >&2
dpkg -x linux-image-*.deb .
rm -rf linux-image-*.deb lib usr
ls "$place"/boot/vmlinuz-*
