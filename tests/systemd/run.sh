#!/usr/bin/env bash
# deploy/systemd under a real systemd: a small Debian in a container of its own, in which a member is started as the unit says, killed and
# stopped. For root on Debian, with debootstrap and systemd-container; `make test-systemd`. Arguments: tenured and tenurectl.
set -euo pipefail
tenured=$1 tenurectl=$2
here=$(cd "$(dirname "$0")" && pwd)
deploy=$here/../../deploy/systemd
work=$(mktemp -d)
root=$work/root
trap 'rm -rf "$work"' EXIT

debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,libstdc++6,curl bookworm "$root" > "$work/debootstrap.log" \
  || { tail -n 5 "$work/debootstrap.log"; exit 1; }
install -m 0755 "$tenured" "$root/usr/local/bin/tenured"
install -m 0755 "$tenurectl" "$root/usr/local/bin/tenurectl"

# As deploy/README.md says, for a cell of one.
chroot "$root" useradd --system tenure
install -m 0644 "$deploy/tenured.service" "$root/etc/systemd/system/"
sed 's/10\.0\.0\.1/127.0.0.1/g; s/^ETCD_INITIAL_CLUSTER=\([^,]*\).*/ETCD_INITIAL_CLUSTER=\1/' "$deploy/tenured.env" > "$work/tenured.env"
install -m 0600 "$work/tenured.env" "$root/etc/default/tenured"
"$tenurectl" cell init --out "$work/cell" --member m1=127.0.0.1 > "$work/init.log"
mkdir -p "$root/etc/tenure"
cp -r "$work/cell/ca.crt" "$work/cell/ca.key" "$work/cell/m1" "$root/etc/tenure/"
chroot "$root" chown -R tenure /etc/tenure

install -m 0755 "$here/inside.sh" "$root/root/"
cat > "$root/etc/systemd/system/inside.service" <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/root/inside.sh
ExecStopPost=/bin/systemctl --no-block poweroff
[Install]
WantedBy=multi-user.target
UNIT
chroot "$root" systemctl enable inside 2> "$work/enable.log"

# A name of its own for the process groups, nothing of the host's bus and network.
timeout 300 systemd-nspawn -q -D "$root" --register=no --keep-unit --private-network -b > "$work/boot.log" 2>&1 || true
cat "$root/root/said" 2> /dev/null || { tail -n 20 "$work/boot.log"; exit 1; }
grep -qx 'all as it should be' "$root/root/said"
