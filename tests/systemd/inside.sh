#!/bin/bash
# Inside the container: see run.sh.
set -u
exec > /root/said 2>&1

failed() {
  echo "FAILED: $1"
  journalctl -u tenured --no-pager -o cat | tail -n 20
  exit 1
}
property() { systemctl show tenured -p "$1" --value; }
healthy() { [ "$(curl -s http://127.0.0.1:2381/health)" = '{"health":"true","reason":""}' ]; }

systemctl start tenured || failed "it does not start"
# It was waited for, without asking again: readiness was told.
healthy || failed "started, and not healthy"
[ "$(property User)" = tenure ] || failed "it runs as somebody else"
[ "$(stat -c '%U %a' /var/lib/tenure)" = "tenure 700" ] || failed "its state is open to others"
echo "started, ready when systemd says so"

first=$(property MainPID)
kill -9 "$first"
until [ "$(property NRestarts)" = 1 ] && [ "$(property ActiveState)" = active ]; do :; done
[ "$(property MainPID)" != "$first" ] && healthy || failed "not healthy after kill -9"
echo "restarted after kill -9, healthy"

systemctl stop tenured || failed "it does not stop"
[ "$(property Result) $(property ExecMainStatus)" = "success 0" ] || failed "it stopped with $(property Result)"
journalctl -u tenured --no-pager -o cat | grep -q '"msg":"stopped"' || failed "it was cut off"
echo "stopped in good order"

# As one ends that its cell has removed (tests/tests/deploy.rs): every other failure is started again.
end_with() {
  mkdir -p /run/systemd/system/tenured.service.d
  printf '[Service]\nExecStart=\nExecStart=/bin/sh -c "exit %s"\n' "$1" > /run/systemd/system/tenured.service.d/end.conf
  systemctl daemon-reload
  systemctl start tenured && failed "it started, and ended with $1"
}
end_with 3
[ "$(property ActiveState)" = failed ] || failed "a removed member is $(property ActiveState)"
end_with 1
[ "$(property ActiveState)" = activating ] || failed "one that failed is $(property ActiveState)"
systemctl stop tenured
echo "not started again when it was removed"
echo "all as it should be"
