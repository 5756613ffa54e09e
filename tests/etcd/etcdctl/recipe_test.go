package etcdctl

// What the client makes of leases, txns and watches. The Lock and Election services have no part in lock and elect.
var recipeScenarios = []scenario{
	// The owner's key is the lock's name and its lease, which nothing else tells.
	{name: "lock", masks: []mask{hide(`name/[0-9a-f]+`, "name/LEASE")}, steps: join(commands(
		"lock name echo held",
		"lock name -- sh -c 'echo $ETCD_LOCK_KEY $ETCD_LOCK_REV'",
		"lock name -- sh -c 'exit 7'",
		"lock name -- no-such-command",
		"lock",
		"get '' --prefix -w json",
	), []step{
		{args: "lock name", talk: []turn{{lines: 2}, {run: "get other -w json"}}},
		{args: "lock name --ttl=20", talk: []turn{{lines: 2}}},
		{args: "lock name -w simple", talk: []turn{{lines: 2}, {run: "del name/ --prefix"}}},
	}, commands("get '' --prefix -w json"))},
	{name: "elect", masks: []mask{hide(`name/[0-9a-f]+`, "name/LEASE")}, steps: join([]step{
		{args: "elect name me", talk: []turn{{lines: 2}, {run: "put other 1"}}},
		{args: "elect name me", talk: []turn{{lines: 2}, {run: "del name/ --prefix"}}},
		{args: "elect --listen name", talk: []turn{
			{run: "put name/abc first", lines: 2},
			{run: "put name/abc second", lines: 2},
		}},
	}, commands(
		"elect name",
		"elect",
		"elect --listen name me",
		"get '' --prefix -w json",
	))},
	// It reads and writes on the same server, so each of its writes is waited for before the next command.
	{name: "make-mirror", steps: join(fruit, []step{
		{args: "make-mirror --prefix a --dest-prefix z/ $ENDPOINT", talk: []turn{
			{ask: "get z/pple", told: "green", watchers: 1},
			{run: "put avocado 1", ask: "get z/vocado", told: "1"},
			{run: "del apple", ask: "get z/pple --count-only -w fields", told: `"Count" : 0`},
			{run: "put az last", ask: "get z/z", told: "last"},
		}},
		{args: "get '' --prefix -w json"},
		{args: "make-mirror --prefix z/ --no-dest-prefix --rev=9 $ENDPOINT", talk: []turn{
			{ask: "get z", told: "last"},
			{run: "put z/n 1", ask: "get n", told: "1"},
		}},
		{args: "get '' --prefix -w json"},
		{args: "compaction 10"},
		{args: "make-mirror --prefix a --rev=5 --dest-prefix y/ $ENDPOINT"},
		{args: "make-mirror"},
	})},
}
