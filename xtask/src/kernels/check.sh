# What a guest of a kernel above the floor runs.
set -eu
say() { echo "=== $*"; }
fail() { echo "FAILED: $*"; exit 1; }
export LIFL_REQUIRE_KERNEL=1

say "doctor"
lifl doctor || true

say "tests of the planes"
planes --test-threads 2 $FILTER
say "tests of Flame's router"
flame --test-threads 2 $FILTER

# What lifl-daemon.service grants, and no more.
say "a daemon with the unit's capabilities"
mkdir -p /run/lifl/pins /run/lifl/sock
mount -t bpf bpf /run/lifl/pins
chown tester /run/lifl/pins /run/lifl/sock
grants=-all,+bpf,+net_admin
setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --inh-caps $grants --ambient-caps $grants \
    --bounding-set $grants lifl-daemon --no-flame --pin /run/lifl/pins/maps --socket /run/lifl/sock/lifl.sock \
    --plane sockmap --huge-pages never 2> /tmp/daemon.log &
daemon=$!
for _ in $(seq 300); do
    grep -q listening /tmp/daemon.log && break
    kill -0 $daemon 2> /dev/null || fail "$(cat /tmp/daemon.log)"
    sleep 0.1
done
setpriv --reuid 1000 --regid 1000 --clear-groups lifl status --daemon /run/lifl/sock/lifl.sock | tee /tmp/status
grep -q 'plane sockmap' /tmp/status || fail "no kernel plane"
grep -q 'without capabilities' /tmp/status || fail "capabilities are left"

job() {
    setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps -all lifl run /etc/job.json --data builtin:digits --rounds 2 \
        --json --out "/tmp/$1" --daemon "$2" --plane "$1" > "/tmp/$1.events" || fail "$(tail -3 "/tmp/$1.events")"
    grep -q "\"plane\":\"$1\"" "/tmp/$1.events" || fail "the job was not on $1: $(head -1 "/tmp/$1.events")"
    grep -c '"event":"round"' "/tmp/$1.events" | grep -q '^2$' || fail "not two rounds: $(cat "/tmp/$1.events")"
    [ -s "/tmp/$1/model.safetensors" ] || fail "no model"
}
say "a job on the kernel plane"
job sockmap /run/lifl/sock/lifl.sock
kill $daemon && wait $daemon || fail "the daemon: $(tail -3 /tmp/daemon.log)"
say "a job on the relay"
job relay own
cmp /tmp/sockmap/model.safetensors /tmp/relay/model.safetensors || fail "the models differ"
say "the models of both are the same, byte for byte"
