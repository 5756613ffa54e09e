package etcdctl

// remaining is the time left of a lease granted for 100,000 s, give or take what the test takes.
var (
	remaining       = hide(`remaining\((100000|99\d\d\d)s\)`, "remaining(TTL)")
	remainingFields = hide(`"TTL" : (100000|99\d\d\d)\n"GrantedTTL"`, "\"TTL\" : TTL\n\"GrantedTTL\"")
	remainingJSON   = hide(`"ttl":(100000|99\d\d\d)\b`, `"ttl":TTL`)
)

var leaseScenarios = []scenario{
	{name: "lease", masks: []mask{remaining, remainingFields, remainingJSON}, steps: join(inFormats(nil,
		"lease list",
		"lease grant 100000",
		"lease list",
	), commands(
		"put leased v --lease=$LEASE1",
	), inFormats(nil,
		"lease timetolive $LEASE1",
		"lease timetolive $LEASE1 --keys",
	), commands(
		"get leased -w json",
		"get leased -w fields",
		"lease keep-alive --once $LEASE1",
		"lease keep-alive --once $LEASE1 -w json",
		"lease keep-alive --once $LEASE1 -w fields",
		// Of several keys etcd lists them in the order of a hash map, so no more are listed than one.
		"put another v --lease=$LEASE1",
		"put leased w --ignore-lease",
		"get leased -w json",
		"put another w",
		"get another -w json",
		"lease timetolive $LEASE1 --keys",
		"put leased v --lease=$LEASE2 --prev-kv -w json",
		"lease timetolive $LEASE1 --keys",
		"lease timetolive $LEASE2 --keys",
		"del leased --prev-kv -w json",
		"lease timetolive $LEASE2 --keys",
		"put b v --lease=$LEASE1",
		"put a v --lease=$LEASE1",
		"put c v --lease=$LEASE1",
		"lease revoke $LEASE1",
		"get '' --prefix -w json",
		"lease revoke $LEASE2 -w json",
		"lease revoke $LEASE3 -w fields",
		"lease list",
	), []step{
		// All keys of the lease go in one revision, in the order of the keys.
		{args: "watch '' --prefix --rev=2 -w json", talk: []turn{{lines: 1}}},
	})},
	{name: "lease that is gone", steps: join(commands(
		"lease grant 100000",
		"lease revoke $LEASE1",
	), inFormats(nil,
		"lease revoke $LEASE1",
		"lease timetolive $LEASE1",
		"lease timetolive $LEASE1 --keys",
		"lease keep-alive --once $LEASE1",
	), commands(
		"lease keep-alive $LEASE1",
		"put k v --lease=$LEASE1",
		"lease revoke 0",
		"lease timetolive 0",
		"lease keep-alive --once 0",
		"lease revoke 7fffffffffffffff",
		"get '' --prefix -w json",
	))},
	{name: "lease list", steps: commands(
		"lease grant 100000",
		"lease grant 300000",
		"lease grant 200000",
		// By the time that is left.
		"lease list",
		"lease list -w json",
		"lease list -w fields",
		"lease revoke $LEASE3",
		"lease list",
	)},
	{name: "lease that is refused", steps: commands(
		"lease grant 0",
		"lease grant -- -5",
		"lease grant 9000000000",
		"lease grant 9000000001",
		"lease grant 99999999999999999999",
		"lease grant",
		"lease grant nonsense",
		"lease grant 1 2",
		"lease revoke",
		"lease revoke nonsense",
		"lease timetolive",
		"lease timetolive nonsense",
		"lease keep-alive",
		"lease nonsense",
		"lease list -w table",
	)},
	{name: "lease that expires", steps: join(commands(
		"lease grant 20",
		"put a v --lease=$LEASE1",
		"put b v --lease=$LEASE1",
	), []step{
		{args: "watch '' --prefix --rev=2 -w json", talk: []turn{{lines: 2}}},
	}, commands(
		"lease timetolive $LEASE1",
		"lease list",
		"get '' --prefix -w json",
	))},
	// It is renewed at once, then every third of its time: how often until it is revoked depends on time, not what is said each time.
	{name: "lease kept alive until it is revoked", masks: []mask{hide(`(lease LEASE1 keepalived with TTL\(20\)\n)+`, "$1")}, steps: []step{
		{args: "lease grant 20"},
		{args: "lease keep-alive $LEASE1", talk: []turn{{lines: 2}, {run: "lease revoke $LEASE1", lines: untilItEnds}}},
	}},
}
