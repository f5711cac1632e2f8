# What a guest of a kernel below the floor runs.
set -eu
say() { echo "=== $*"; }
fail() { echo "FAILED: $*"; exit 1; }
named="kernel $KERNEL.*older than 5.15"

say "doctor refuses it by name"
lifl doctor | tee /tmp/doctor || true
grep -q "$named" /tmp/doctor || fail "doctor does not name the kernel"

say "the daemon refuses it by name"
code=0
lifl-daemon --no-flame --no-pin --plane sockmap --socket /tmp/lifl.sock 2> /tmp/log || code=$?
cat /tmp/log
[ $code = 3 ] || fail "exit code $code"
grep -q "$named" /tmp/log || fail "the daemon does not name the kernel"

say "a job on the relay"
lifl run /etc/job.json --data builtin:digits --rounds 2 --huge-pages never --out /tmp/run > /tmp/run.log 2>&1 \
    || fail "$(tail -5 /tmp/run.log)"
cat /tmp/run.log
grep -q "$named" /tmp/run.log || fail "the run does not say why it is on the relay"
