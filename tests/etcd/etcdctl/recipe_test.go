package etcdctl

// lock and elect are made by the client, of leases, txns and watches; the Lock and Election services have no part in it.
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
		{args: "lock name --ttl=5", talk: []turn{{lines: 2}}},
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
}
